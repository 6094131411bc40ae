//! Audio files to samples and back: WAV, FLAC, MP3, Ogg Vorbis and AAC (bare or in MP4) are read, mixed and resampled, as
//! a whole or as they come; 16-bit WAV is written.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use roofbench_core::session::SessionError;
use rubato::audioadapter_buffers::direct::InterleavedSlice;
use rubato::{Fft, FixedSync, Resampler as _};
use symphonia::core::codecs::audio::{AudioDecoder, AudioDecoderOptions};
use symphonia::core::errors::Error;
use symphonia::core::formats::probe::Hint;
use symphonia::core::formats::{FormatOptions, FormatReader, TrackType};
use symphonia::core::io::MediaSourceStream;
use symphonia::core::meta::MetadataOptions;

/// The most samples, channels together, that a whole file may come to: 1 GiB of them, 4.6 hours at 16 kHz.
const MOST_SAMPLES: usize = 1 << 28;
/// Rates that a recorder may have, in Hz.
const RATES: std::ops::RangeInclusive<u32> = 1..=1_000_000;

/// Samples of one or more channels.
#[derive(Debug, Clone, PartialEq)]
pub struct Sound {
    /// Samples in [-1, 1], each channel by itself; all are as long.
    pub channels: Vec<Vec<f32>>,
    /// Samples a second.
    pub rate: u32,
}

impl Sound {
    /// Decodes the first audio track of `path`, recognised by its content.
    ///
    /// # Errors
    /// [`SessionError::File`] when it can't be read, is hours long, or has no audio that can be decoded from its first
    /// packet to its last.
    pub fn read(path: &Path) -> Result<Self, SessionError> {
        let mut pieces = Reader::open(path)?;
        let mut whole = pieces.next().transpose()?.ok_or_else(|| nothing(path))?;
        for piece in pieces {
            let piece = piece?;
            whole.channels.iter_mut().zip(piece.channels).for_each(|(all, piece)| all.extend(piece));
            if whole.channels.len() * whole.len() > MOST_SAMPLES {
                let reason = format!("has more than {MOST_SAMPLES} samples, the most of a whole file; cut it");
                return Err(SessionError::File { path: path.to_owned(), reason });
            }
        }
        Ok(whole)
    }

    /// Samples of each channel.
    pub fn len(&self) -> usize {
        self.channels.first().map_or(0, Vec::len)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How long it lasts.
    pub fn seconds(&self) -> f64 {
        self.len() as f64 / f64::from(self.rate)
    }

    /// The mean of its channels.
    pub fn mono(&self) -> Vec<f32> {
        let Some((first, others)) = self.channels.split_first() else { return Vec::new() };
        let mut mixed = first.clone();
        if !others.is_empty() {
            for channel in others {
                mixed.iter_mut().zip(channel).for_each(|(sum, x)| *sum += x);
            }
            let count = self.channels.len() as f32;
            mixed.iter_mut().for_each(|x| *x /= count);
        }
        mixed
    }

    /// With so many channels: where it has another number of them, each is their mean.
    pub fn mixed(self, channels: usize) -> Self {
        match self.channels.len() == channels {
            true => self,
            false => Self { channels: vec![self.mono(); channels], rate: self.rate },
        }
    }

    /// At `rate` samples a second, low-passed where that is fewer; as it is where that is its rate.
    ///
    /// The filter is rubato's, not the one that a model's own data went through, so samples agree with those of other
    /// programs to about -80 dB.
    ///
    /// # Errors
    /// [`SessionError::Input`] when a rate is 0 or beyond any recorder's, or the result would be hours long.
    pub fn resampled(self, rate: u32) -> Result<Self, SessionError> {
        if rate == self.rate || self.is_empty() {
            return Ok(Self { rate, ..self });
        }
        let longer = self.len() as f64 * f64::from(rate) / f64::from(self.rate.max(1));
        if longer * self.channels.len() as f64 > MOST_SAMPLES as f64 {
            let reason = format!("{} to {rate} Hz: comes to {longer:.0} samples; cut the sound", self.rate);
            return Err(SessionError::input("sampling_rate", reason));
        }
        let resample = |samples: &Vec<f32>| {
            let mut resampler = Resampler::new(self.rate, rate)?;
            let mut resampled = resampler.push(samples)?;
            resampled.extend(resampler.finish()?);
            Ok(resampled)
        };
        Ok(Self { channels: self.channels.iter().map(resample).collect::<Result<_, SessionError>>()?, rate })
    }

    /// Writes a WAV file of 16-bit samples; what lies outside [-1, 1] is clipped.
    ///
    /// # Errors
    /// As for [`WavWriter`].
    ///
    /// ```
    /// use roofbench_speech::audio::Sound;
    /// let folder = tempfile::tempdir()?;
    /// let path = folder.path().join("tone.wav");
    /// let sound = Sound { channels: vec![vec![0.0, 0.5, -1.0]], rate: 8000 };
    /// sound.write(&path)?;
    /// assert_eq!(Sound::read(&path)?, sound);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn write(&self, path: &Path) -> Result<(), SessionError> {
        let mut writer = WavWriter::create(path, self.channels.len(), self.rate)?;
        writer.write(&self.channels)?;
        writer.finish()
    }
}

/// A WAV file that is being written, 16 bits a sample.
pub struct WavWriter {
    writer: hound::WavWriter<BufWriter<File>>,
    path: PathBuf,
}

impl WavWriter {
    /// Begins the file at `path`, over one that is there.
    ///
    /// # Errors
    /// Names the file, when it can't be written or WAV has no such number of channels.
    pub fn create(path: &Path, channels: usize, rate: u32) -> Result<Self, SessionError> {
        let refuse = |reason: String| SessionError::File { path: path.to_owned(), reason };
        let channels = u16::try_from(channels)
            .ok()
            .filter(|n| *n > 0)
            .ok_or_else(|| refuse(format!("has {channels} channels")))?;
        let format = hound::WavSpec {
            channels,
            sample_rate: rate,
            bits_per_sample: 16,
            sample_format: hound::SampleFormat::Int,
        };
        let writer = hound::WavWriter::create(path, format).map_err(|error| refuse(error.to_string()))?;
        Ok(Self { writer, path: path.to_owned() })
    }

    /// Adds samples, each channel by itself, all as long.
    ///
    /// # Errors
    /// Names the file that can't be written.
    pub fn write(&mut self, channels: &[Vec<f32>]) -> Result<(), SessionError> {
        let steps = channels.iter().map(Vec::len).min().unwrap_or_default();
        for at in 0..steps {
            for channel in channels {
                let sample = (channel[at] * 32768.0).round().clamp(-32768.0, 32767.0) as i16;
                self.writer.write_sample(sample).map_err(|error| refused(&self.path, &error))?;
            }
        }
        Ok(())
    }

    /// Writes what the beginning of the file says of its length.
    ///
    /// # Errors
    /// Names the file that can't be written.
    pub fn finish(self) -> Result<(), SessionError> {
        self.writer.finalize().map_err(|error| refused(&self.path, &error))
    }
}

fn refused(path: &Path, reason: &dyn std::fmt::Display) -> SessionError {
    SessionError::File { path: path.to_owned(), reason: reason.to_string() }
}

/// Resamples one channel as its samples come.
struct Resampler {
    inner: Fft<f32>,
    rates: [u32; 2],
    /// Not enough for a block yet.
    pending: Vec<f32>,
    /// Samples in and out so far.
    counts: [usize; 2],
    /// Samples that the filter gives before the first.
    delay: usize,
}

impl Resampler {
    fn new(from: u32, to: u32) -> Result<Self, SessionError> {
        let refuse = |error: &str| Err(SessionError::input("sampling_rate", format!("{from} to {to} Hz: {error}")));
        if let Some(rate) = [from, to].into_iter().find(|rate| !RATES.contains(rate)) {
            return refuse(&format!("{rate} is not in {}..={}", RATES.start(), RATES.end()));
        }
        // An even number of the shortest blocks that both rates share: the middle of the filter is then a whole sample
        // of either, and nothing is shifted by a part of one.
        let shortest = (from / gcd(from, to)) as usize;
        let block = 2 * shortest * 512usize.div_ceil(shortest);
        match Fft::<f32>::new(from as usize, to as usize, block, 1, FixedSync::Both) {
            Ok(inner) => {
                let delay = inner.output_delay();
                Ok(Self { inner, rates: [from, to], pending: Vec::new(), counts: [0; 2], delay })
            }
            Err(error) => refuse(&error.to_string()),
        }
    }

    /// What comes of `samples` and those before them that is not given yet.
    fn push(&mut self, samples: &[f32]) -> Result<Vec<f32>, SessionError> {
        self.counts[0] += samples.len();
        self.pending.extend(samples);
        let (block, mut made) = (self.inner.input_frames_next(), Vec::new());
        let whole = self.pending.len() - self.pending.len() % block;
        let blocks: Vec<f32> = self.pending.drain(..whole).collect();
        for block in blocks.chunks_exact(block) {
            self.block(block, &mut made)?;
        }
        self.counts[1] += made.len();
        Ok(made)
    }

    /// The rest.
    fn finish(&mut self) -> Result<Vec<f32>, SessionError> {
        let wanted = (self.inner.resample_ratio() * self.counts[0] as f64).ceil() as usize;
        let mut made = Vec::new();
        let mut block = std::mem::take(&mut self.pending);
        while self.counts[1] + made.len() < wanted {
            block.resize(self.inner.input_frames_next(), 0.0); // silence behind the end
            self.block(&block, &mut made)?;
            block.clear();
        }
        made.truncate(wanted.saturating_sub(self.counts[1]));
        Ok(made)
    }

    fn block(&mut self, block: &[f32], made: &mut Vec<f32>) -> Result<(), SessionError> {
        let [from, to] = self.rates;
        let refuse = |error: String| SessionError::input("sampling_rate", format!("{from} to {to} Hz: {error}"));
        let input = InterleavedSlice::new(block, 1, block.len()).map_err(|error| refuse(error.to_string()))?;
        let output = self.inner.process(&input, None).map_err(|error| refuse(error.to_string()))?.take_data();
        let early = self.delay.min(output.len());
        self.delay -= early;
        made.extend(&output[early..]);
        Ok(())
    }
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn nothing(path: &Path) -> SessionError {
    refused(path, &"holds no samples (WAV, FLAC, MP3, Ogg Vorbis and AAC are read)")
}

/// The first audio track of a file, packet by packet; an error ends it.
pub struct Reader {
    path: PathBuf,
    format: Box<dyn FormatReader>,
    decoder: Box<dyn AudioDecoder>,
    track: u32,
    /// Channels and rate of the first packet.
    layout: Option<(usize, u32)>,
    interleaved: Vec<f32>,
    ended: bool,
}

impl Reader {
    /// Opens `path` and recognises what it is by its content.
    ///
    /// # Errors
    /// [`SessionError::File`] when it can't be read or is no audio.
    pub fn open(path: &Path) -> Result<Self, SessionError> {
        let file = File::open(path).map_err(|error| refused(path, &error))?;
        if file.metadata().is_ok_and(|data| data.is_file() && data.len() == 0) {
            return Err(refused(path, &"is no audio: the file is empty"));
        }
        let mut hint = Hint::new();
        if let Some(extension) = path.extension().and_then(|extension| extension.to_str()) {
            hint.with_extension(extension);
        }
        let (format, decoder, track) = recognise(file, &hint).map_err(|error| explained(path, error))?;
        let path = path.to_owned();
        Ok(Self { path, format, decoder, track, layout: None, interleaved: Vec::new(), ended: false })
    }

    fn packet(&mut self) -> Result<Option<Sound>, Error> {
        while let Some(packet) = self.format.next_packet()? {
            if packet.track_id != self.track {
                continue;
            }
            let buffer = self.decoder.decode(&packet)?;
            let (count, rate) = (buffer.spec().channels().count(), buffer.spec().rate());
            if *self.layout.get_or_insert((count, rate)) != (count, rate) {
                return Err(Error::Unsupported("a change of channels or rate within the track"));
            }
            if count == 0 || !RATES.contains(&rate) {
                return Err(Error::DecodeError("no channels, or a sample rate that is 0 or beyond any recorder's"));
            }
            buffer.copy_to_vec_interleaved(&mut self.interleaved);
            if self.interleaved.is_empty() {
                continue;
            }
            if self.interleaved.iter().any(|sample| !sample.is_finite()) {
                return Err(Error::DecodeError("samples that are no finite numbers"));
            }
            let channel = |at: usize| self.interleaved.iter().skip(at).step_by(count).copied().collect();
            return Ok(Some(Sound { channels: (0..count).map(channel).collect(), rate }));
        }
        Ok(None)
    }
}

impl Iterator for Reader {
    type Item = Result<Sound, SessionError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = match self.packet() {
            Ok(Some(sound)) => return Some(Ok(sound)),
            Ok(None) if self.layout.is_none() => Some(Err(nothing(&self.path))),
            Ok(None) => None,
            Err(error) => Some(Err(explained(&self.path, error))),
        };
        self.ended = true;
        next
    }
}

fn explained(path: &Path, error: Error) -> SessionError {
    let formats = "WAV, FLAC, MP3, Ogg Vorbis and AAC are read";
    match error {
        Error::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            refused(path, &format!("is no audio, or ends too early ({formats})"))
        }
        error => refused(path, &format!("can't be decoded: {error} ({formats}); convert it to WAV")),
    }
}

/// A file's format and decoder, and which of its tracks is heard.
type Recognised = (Box<dyn FormatReader>, Box<dyn AudioDecoder>, u32);

fn recognise(file: File, hint: &Hint) -> Result<Recognised, Error> {
    let stream = MediaSourceStream::new(Box::new(file), Default::default());
    let probe = symphonia::default::get_probe();
    let format = probe.probe(hint, stream, FormatOptions::default(), MetadataOptions::default())?;
    let track = format.default_track(TrackType::Audio).ok_or(Error::Unsupported("no audio track"))?;
    let id = track.id;
    let parameters = track.codec_params.as_ref().and_then(|parameters| parameters.audio());
    let parameters = parameters.ok_or(Error::Unsupported("an unknown codec"))?;
    let decoder = symphonia::default::get_codecs().make_audio_decoder(parameters, &AudioDecoderOptions::default())?;
    Ok((format, decoder, id))
}

/// Samples of each channel.
type Piece = Result<Vec<Vec<f32>>, SessionError>;

/// A file's sound as a model takes it, with no more of it in memory than is asked for at once.
pub struct Feed {
    pieces: Box<dyn Iterator<Item = Piece>>,
    held: Vec<Vec<f32>>,
    rate: u32,
}

/// Pieces that a thread may be ahead.
const AHEAD: usize = 8;

impl Feed {
    /// The sound of `path` at `rate`, mixed to `channels`; with `overlapped` it is decoded and resampled on a thread of
    /// its own, ahead of who listens.
    ///
    /// # Errors
    /// As for [`Reader::open`].
    pub fn open(path: &Path, rate: u32, channels: usize, overlapped: bool) -> Result<Self, SessionError> {
        let converted = Converted { reader: Reader::open(path)?, resamplers: Vec::new(), rate, channels, ended: false };
        let pieces: Box<dyn Iterator<Item = Piece>> = match overlapped {
            false => Box::new(converted),
            true => {
                let (sender, receiver) = mpsc::sync_channel(AHEAD);
                // ends when the file does, or when nobody listens any more
                std::thread::spawn(move || {
                    for piece in converted {
                        if sender.send(piece).is_err() {
                            break;
                        }
                    }
                });
                Box::new(receiver.into_iter())
            }
        };
        Ok(Self { pieces, held: vec![Vec::new(); channels], rate })
    }

    /// Reads on until `samples` are there, and says how many are: fewer where the file ends.
    ///
    /// # Errors
    /// As for [`Sound::read`].
    pub fn fill(&mut self, samples: usize) -> Result<usize, SessionError> {
        while self.held.first().is_some_and(|held| held.len() < samples) {
            let Some(piece) = self.pieces.next().transpose()? else { break };
            self.held.iter_mut().zip(piece).for_each(|(held, piece)| held.extend(piece));
        }
        Ok(self.held.first().map_or(0, Vec::len))
    }

    /// The next `samples` of those that are there, or all.
    pub fn window(&self, samples: usize) -> Sound {
        let next = |held: &Vec<f32>| held[..samples.min(held.len())].to_vec();
        Sound { channels: self.held.iter().map(next).collect(), rate: self.rate }
    }

    /// Leaves `samples` behind.
    pub fn advance(&mut self, samples: usize) {
        self.held.iter_mut().for_each(|held| drop(held.drain(..samples.min(held.len()))));
    }
}

/// The packets of a file, mixed and resampled.
struct Converted {
    reader: Reader,
    /// Of each channel; none before the first packet.
    resamplers: Vec<Resampler>,
    rate: u32,
    channels: usize,
    ended: bool,
}

impl Converted {
    fn convert(&mut self, sound: Sound) -> Piece {
        let sound = sound.mixed(self.channels);
        if sound.rate == self.rate {
            return Ok(sound.channels);
        }
        while self.resamplers.len() < self.channels {
            self.resamplers.push(Resampler::new(sound.rate, self.rate)?);
        }
        self.resamplers.iter_mut().zip(&sound.channels).map(|(resampler, samples)| resampler.push(samples)).collect()
    }
}

impl Iterator for Converted {
    type Item = Piece;

    fn next(&mut self) -> Option<Self::Item> {
        match self.reader.next() {
            Some(piece) => Some(piece.and_then(|piece| self.convert(piece))),
            None if self.ended || self.resamplers.is_empty() => None,
            None => {
                self.ended = true;
                Some(self.resamplers.iter_mut().map(Resampler::finish).collect())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A WAV file of 16-bit samples, channels interleaved.
    fn wav(rate: u32, channels: u16, samples: &[i16]) -> Vec<u8> {
        let size = 2 * samples.len() as u32;
        let mut bytes = Vec::new();
        bytes.extend(b"RIFF");
        bytes.extend((36 + size).to_le_bytes());
        bytes.extend(b"WAVEfmt ");
        bytes.extend(16u32.to_le_bytes());
        bytes.extend(1u16.to_le_bytes());
        bytes.extend(channels.to_le_bytes());
        bytes.extend(rate.to_le_bytes());
        bytes.extend((rate * 2 * u32::from(channels)).to_le_bytes());
        bytes.extend((2 * channels).to_le_bytes());
        bytes.extend(16u16.to_le_bytes());
        bytes.extend(b"data");
        bytes.extend(size.to_le_bytes());
        bytes.extend(samples.iter().flat_map(|x| x.to_le_bytes()));
        bytes
    }

    #[test]
    fn sixteen_bit_samples_are_exact_and_channels_mixed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stereo.wav");
        std::fs::write(&path, wav(8000, 2, &[0, 16384, -32768, 0, 32767, 1])).unwrap();
        let sound = Sound::read(&path).unwrap();
        assert_eq!(sound.rate, 8000);
        assert_eq!(sound.channels, [vec![0.0, -1.0, 32767.0 / 32768.0], vec![0.5, 0.0, 1.0 / 32768.0]]);
        assert_eq!(sound.mono(), [0.25, -0.5, 0.5]);
    }

    #[test]
    fn files_that_are_no_audio_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text.wav");
        let message = |path: &Path| Sound::read(path).unwrap_err().to_string();
        assert!(message(&path).contains("text.wav"));
        let truncated = &wav(8000, 1, &[1, 2, 3])[..20];
        let contents =
            [&b""[..], b"not audio at all, but a sentence", truncated, &wav(8000, 1, &[]), &wav(0, 1, &[1; 40])];
        for content in contents {
            std::fs::write(&path, content).unwrap();
            assert!(message(&path).contains("text.wav: "), "{}", message(&path));
        }
        // 32-bit floats, one of which is no number
        let format = hound::WavSpec {
            channels: 1,
            sample_rate: 8000,
            bits_per_sample: 32,
            sample_format: hound::SampleFormat::Float,
        };
        let mut writer = hound::WavWriter::create(&path, format).unwrap();
        [0.5, f32::NAN, 0.25].into_iter().for_each(|sample| writer.write_sample(sample).unwrap());
        writer.finalize().unwrap();
        assert!(message(&path).contains("no finite numbers"), "{}", message(&path));
    }

    #[test]
    fn tones_are_kept_and_what_does_not_fit_is_removed() {
        let tone = |hertz: f64, rate: u32| {
            let samples =
                (0..rate).map(|i| (std::f64::consts::TAU * hertz * f64::from(i) / f64::from(rate)).sin() as f32);
            Sound { channels: vec![samples.collect()], rate }
        };
        let largest = |a: &[f32], b: &[f32]| {
            let middle = 500..a.len() - 500; // the ends meet silence
            a[middle.clone()].iter().zip(&b[middle]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        };
        for (from, to) in [(44_100, 16_000), (48_000, 16_000), (8_000, 16_000), (48_000, 24_000)] {
            // as parts of the lower rate; all that is heard is below a half
            for part in [0.03, 0.2, 0.4] {
                let hertz = part * f64::from(from.min(to));
                let got = tone(hertz, from).resampled(to).unwrap();
                let want = tone(hertz, to);
                assert_eq!((got.rate, got.channels[0].len()), (to, to as usize));
                let error = largest(&got.channels[0], &want.channels[0]);
                assert!(error < 1e-4, "{from} to {to}, {hertz} Hz: {error}");
            }
        }
        let silence = vec![0.0; 16_000];
        assert!(largest(&tone(9_500.0, 44_100).resampled(16_000).unwrap().channels[0], &silence) < 1e-3);
        assert!(Sound { channels: vec![vec![0.5]], rate: 8000 }.resampled(0).is_err());
        let slow = Sound { channels: vec![vec![0.5; 100_000]], rate: 1 };
        assert!(slow.resampled(16_000).is_err_and(|error| error.to_string().contains("cut the sound")));
    }

    /// Every format that is read, of one 440 Hz tone: what comes piece by piece is what comes as a whole.
    #[test]
    fn formats_agree_whole_and_in_pieces() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        // what the encoder of the MP3 makes of it is 5 % softer
        for (file, seconds, amplitude, error) in [
            ("tone.wav", 0.5, 0.5, 1e-3),
            ("tone.flac", 0.5, 0.5, 1e-3),
            ("tone.mp3", 0.5, 0.475, 0.03),
            ("tone.ogg", 0.5, 0.5, 0.03),
            ("tone.aac", 0.5, 0.5, 0.03),
            ("tone.m4a", 0.5, 0.5, 0.03),
        ] {
            let path = fixtures.join(file);
            let whole = Sound::read(&path).unwrap().mixed(1).resampled(16_000).unwrap();
            // encoders of lossy formats add some silence
            assert!((whole.seconds() - seconds).abs() < 0.15, "{file}: {}", whole.seconds());
            for overlapped in [false, true] {
                let mut feed = Feed::open(&path, 16_000, 1, overlapped).unwrap();
                let mut pieces = Vec::new();
                while feed.fill(1000).unwrap() > 0 {
                    pieces.extend(feed.window(1000).mono());
                    feed.advance(1000);
                }
                assert_eq!(pieces, whole.channels[0], "{file}");
            }
            // least squares of a sine and a cosine on the middle: half a second of 440 Hz and nothing else
            let middle = &whole.channels[0][3000..6200]; // 88 periods
            let basis = |at: usize| (std::f64::consts::TAU * 440.0 * at as f64 / 16_000.0).sin_cos();
            let project = |f: fn((f64, f64)) -> f64| {
                middle.iter().enumerate().map(|(at, x)| f64::from(*x) * f(basis(at))).sum::<f64>() * 2.0 / 3200.0
            };
            let (sine, cosine) = (project(|basis| basis.0), project(|basis| basis.1));
            assert!((sine.hypot(cosine) - amplitude).abs() < 0.02, "{file}: {}", sine.hypot(cosine));
            let rest = |(at, x): (usize, &f32)| (f64::from(*x) - sine * basis(at).0 - cosine * basis(at).1).abs();
            let rest = middle.iter().enumerate().map(rest).fold(0.0, f64::max);
            assert!(rest < error, "{file}: {rest}");
        }
    }
}
