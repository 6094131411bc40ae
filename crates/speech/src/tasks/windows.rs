//! Long sounds window by window, as they are decoded: how long each window takes, and how fast that is against the sound.

use std::path::Path;
use std::time::Instant;

use roofbench_core::session::{Session, SessionError, Unobserved};
use roofbench_core::stats::Summary;
use roofbench_core::task::Answer;

use super::words::Segment;
use super::{Answers, Features, Listen, QUALITY, Quality, best, characters, decoded, numbered, output, text, texts};
use crate::audio::{Sound, WavWriter};

/// Of a window to either side this part is heard for what stands between, as in the library's pipeline.
const CONTEXT: usize = 6;

/// A part of a sound.
struct Window {
    sound: Sound,
    /// Seconds before it.
    begin: f64,
    is_first: bool,
    is_last: bool,
}

/// How fast a sound was heard.
#[derive(Default)]
struct Pace {
    seconds: f64,
    /// From a window that is there to what it means.
    latencies_ns: Vec<u64>,
    /// Decoding included.
    wall: f64,
}

impl Pace {
    fn row(&self, name: &str) -> Vec<String> {
        let summary = Summary::of(&self.latencies_ns);
        let milliseconds = |ns: Option<f64>, without: &str| match ns {
            Some(ns) => format!("{:.1} ms", ns * 1e-6),
            None => without.to_owned(),
        };
        vec![
            name.to_owned(),
            format!("{:.2}", self.seconds),
            self.latencies_ns.len().to_string(),
            milliseconds(summary.as_ref().map(|latency| latency.median), "no window"),
            milliseconds(summary.as_ref().and_then(|latency| latency.p95), "takes 20 windows"),
            format!("{:.4}", self.wall / self.seconds),
            format!("{:.1}", self.seconds / self.wall),
        ]
    }
}

const PACE: [&str; 7] = ["input", "seconds", "windows", "latency p50", "latency p95", "RTF", "RTFx"];

impl Listen {
    /// Goes through the sound of `path`; `hear` gets each window and says how many samples are done with.
    fn walk(
        &self,
        path: &Path,
        mut hear: impl FnMut(Window) -> Result<usize, SessionError>,
    ) -> Result<Pace, SessionError> {
        let (rate, length) = (f64::from(self.features.rate()), self.window());
        // a rest that may be too short for a frame goes with the window before it, where the model takes that
        let rest = if matches!(self.features, Features::Whisper(_)) { 0 } else { self.samples(0.1) };
        let began = Instant::now();
        let (mut feed, mut pace, mut done) = (self.open(path)?, Pace::default(), 0usize);
        loop {
            let there = feed.fill(length + rest + 1)?;
            let is_last = there <= length + rest;
            let sound = feed.window(if is_last { there } else { length });
            if sound.is_empty() {
                break;
            }
            let samples = sound.len();
            let window = Window { sound, begin: done as f64 / rate, is_first: done == 0, is_last };
            let start = Instant::now();
            let step = hear(window)?;
            pace.latencies_ns.push(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX));
            let step = step.clamp(1, samples);
            feed.advance(step);
            done += step;
            if is_last && step == samples {
                break;
            }
        }
        Ok(Pace { seconds: done as f64 / rate, wall: began.elapsed().as_secs_f64(), ..pace })
    }

    /// What all files mean, heard window by window.
    pub(super) fn in_windows(&self, session: &mut dyn Session) -> Result<Vec<Answer>, SessionError> {
        let (mut rows, mut paces, mut answers) = (Vec::new(), Vec::new(), Vec::new());
        let count = self.raw.audio.len();
        for (item, (path, name)) in self.raw.audio.iter().zip(self.names()).enumerate() {
            let pace = match &self.answers {
                Answers::Frames(decoder) => {
                    let mut ids = Vec::new();
                    let pace = self.walk(path, |window| self.frames(window, session, &mut ids))?;
                    rows.push(vec![name.clone(), characters(decoder.as_ref(), &ids)]);
                    pace
                }
                Answers::Tokens(tokenizer) => {
                    let mut parts = Vec::new();
                    let pace = self.walk(path, |window| {
                        let samples = window.sound.len();
                        let tokens = output(&self.hear(window.sound, session)?, "sequences")?.to_vec2::<i64>()?;
                        parts.push(text(tokenizer.as_deref(), tokens.first().map_or(&[][..], Vec::as_slice))?);
                        Ok(samples)
                    })?;
                    rows.push(vec![name.clone(), parts.join(" ")]);
                    pace
                }
                Answers::Words(words) => {
                    let (mut segments, mut language): (Vec<Segment>, Option<String>) = (Vec::new(), None);
                    let pace = self.walk(path, |window| {
                        let (seconds, samples) = (window.sound.seconds(), window.sound.len());
                        let mut call = self.call_of(&[window.sound])?;
                        words.hold(&mut call.arguments, language.as_deref());
                        let outputs = session.call(&call, &mut Unobserved)?;
                        let tokens = output(&outputs, "sequences")?.to_vec2::<i64>()?;
                        let tokens = tokens.first().map_or(&[][..], Vec::as_slice);
                        language = language.take().or_else(|| words.language(tokens));
                        let heard = words.read(tokens, seconds)?;
                        segments.extend(heard.segments.into_iter().map(|segment| segment.later(window.begin)));
                        Ok(heard.end.map_or(samples, |end| self.samples(end)))
                    })?;
                    answers.push(words.table([(name.clone(), segments)].into_iter()));
                    pace
                }
                Answers::Codec { codebook_size } => {
                    let (mut quality, mut writer) = (Quality::default(), None);
                    let save = self.raw.save.as_ref().map(|path| numbered(path, item, count));
                    if let Some(path) = &save {
                        writer = Some(WavWriter::create(path, self.features.channels(), self.features.rate())?);
                    }
                    let pace = self.walk(path, |window| {
                        let outputs = self.hear(window.sound.clone(), session)?;
                        for (made, codes) in decoded(std::slice::from_ref(&window.sound), &outputs)? {
                            quality.add(Quality::of(&window.sound, &made, codes, codebook_size.ilog2()));
                            if let Some(writer) = &mut writer {
                                writer.write(&made)?;
                            }
                        }
                        Ok(window.sound.len())
                    })?;
                    rows.push(quality.row(&name));
                    if let Some(writer) = writer {
                        writer.finish()?;
                    }
                    answers.extend(save.map(Answer::Saved));
                    pace
                }
                Answers::Voices | Answers::Labels | Answers::FrameLabels | Answers::States => {
                    return Err(SessionError::input("chunk", "is for recognisers and codecs"));
                }
            };
            paces.push(pace.row(&name));
        }
        let table = match &self.answers {
            Answers::Frames(decoder) => Some(texts(rows, decoder.is_some(), "vocab.json")),
            Answers::Tokens(tokenizer) => Some(texts(rows, tokenizer.is_some(), "tokenizer.json")),
            Answers::Codec { .. } => Some(Answer::table(&QUALITY, rows)),
            _ => None,
        };
        Ok(table.into_iter().chain(answers).chain([Answer::table(&PACE, paces)]).collect())
    }

    /// Adds the frames of the middle of a window, which its sides are heard for.
    fn frames(&self, window: Window, session: &mut dyn Session, ids: &mut Vec<u32>) -> Result<usize, SessionError> {
        let (samples, context) = (window.sound.len(), self.window() / CONTEXT);
        let found = best(output(&self.hear(window.sound, session)?, "logits")?)?;
        let found = found.first().map_or(&[][..], Vec::as_slice);
        let frames = |samples_of: usize| (found.len() * samples_of + samples / 2) / samples;
        let from = if window.is_first { 0 } else { frames(context) };
        let to = if window.is_last { found.len() } else { frames(samples - context) };
        ids.extend(&found[from.min(to)..to]);
        Ok(if window.is_last { samples } else { samples - 2 * context })
    }
}
