//! Audio files to samples: WAV, FLAC, MP3, Ogg Vorbis and AAC (bare or in MP4), mixed to one channel and resampled.

use std::fs::File;
use std::path::Path;

use roofbench_core::session::SessionError;
use rubato::audioadapter_buffers::direct::InterleavedSlice;
use rubato::{Fft, FixedSync, Resampler};
use symphonia::core::codecs::audio::AudioDecoderOptions;
use symphonia::core::errors::Error;
use symphonia::core::formats::probe::Hint;
use symphonia::core::formats::{FormatOptions, TrackType};
use symphonia::core::io::MediaSourceStream;
use symphonia::core::meta::MetadataOptions;

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
    /// [`SessionError::File`] when it can't be read, or has no audio that can be decoded from its first packet to its
    /// last.
    pub fn read(path: &Path) -> Result<Self, SessionError> {
        let refuse = |reason: String| SessionError::File { path: path.to_owned(), reason };
        let file = File::open(path).map_err(|error| refuse(error.to_string()))?;
        let mut hint = Hint::new();
        if let Some(extension) = path.extension().and_then(|extension| extension.to_str()) {
            hint.with_extension(extension);
        }
        decode(file, &hint).map_err(|error| {
            let formats = "WAV, FLAC, MP3, Ogg Vorbis and AAC are read";
            refuse(match error {
                Error::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                    format!("is no audio, or ends too early ({formats})")
                }
                error => format!("can't be decoded: {error} ({formats}); convert it to WAV"),
            })
        })
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

    /// At `rate` samples a second, low-passed where that is fewer; as it is where that is its rate.
    ///
    /// The filter is rubato's, not the one that a model's own data went through, so samples agree with those of other
    /// programs to about -80 dB.
    ///
    /// # Errors
    /// [`SessionError::Input`] when a rate is 0.
    pub fn resampled(self, rate: u32) -> Result<Self, SessionError> {
        if rate == self.rate || self.channels.iter().all(Vec::is_empty) {
            return Ok(Self { rate, ..self });
        }
        let refuse =
            |error: String| SessionError::input("sampling_rate", format!("{} to {rate} Hz: {error}", self.rate));
        // An even number of the shortest blocks that both rates share: the middle of the filter is then a whole sample
        // of either, and nothing is shifted by a part of one.
        let (from, to) = (self.rate as usize, rate as usize);
        let shortest = from / gcd(from, to).max(1);
        let block = 2 * shortest * 512usize.div_ceil(shortest.max(1));
        let mut resampler =
            Fft::<f32>::new(from, to, block, 1, FixedSync::Both).map_err(|error| refuse(error.to_string()))?;
        let mut resample = |samples: &Vec<f32>| {
            let input = InterleavedSlice::new(samples, 1, samples.len()).map_err(|error| refuse(error.to_string()))?;
            let output = resampler.process_all(&input, samples.len(), None);
            output.map(|output| output.take_data()).map_err(|error| refuse(error.to_string()))
        };
        let channels = self.channels.iter().map(&mut resample).collect::<Result<_, _>>()?;
        Ok(Self { channels, rate })
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn decode(file: File, hint: &Hint) -> Result<Sound, Error> {
    let stream = MediaSourceStream::new(Box::new(file), Default::default());
    let probe = symphonia::default::get_probe();
    let mut format = probe.probe(hint, stream, FormatOptions::default(), MetadataOptions::default())?;
    let track = format.default_track(TrackType::Audio).ok_or(Error::Unsupported("no audio track"))?;
    let id = track.id;
    let parameters = track.codec_params.as_ref().and_then(|parameters| parameters.audio());
    let parameters = parameters.ok_or(Error::Unsupported("an unknown codec"))?;
    let mut decoder =
        symphonia::default::get_codecs().make_audio_decoder(parameters, &AudioDecoderOptions::default())?;

    let mut sound: Option<Sound> = None;
    let mut interleaved: Vec<f32> = Vec::new();
    while let Some(packet) = format.next_packet()? {
        if packet.track_id != id {
            continue;
        }
        let buffer = decoder.decode(&packet)?;
        let (count, rate) = (buffer.spec().channels().count(), buffer.spec().rate());
        let sound = sound.get_or_insert_with(|| Sound { channels: vec![Vec::new(); count], rate });
        if (sound.channels.len(), sound.rate) != (count, rate) {
            return Err(Error::Unsupported("a change of channels or rate within the track"));
        }
        buffer.copy_to_vec_interleaved(&mut interleaved);
        for (at, channel) in sound.channels.iter_mut().enumerate() {
            channel.extend(interleaved.iter().skip(at).step_by(count));
        }
    }
    sound.filter(|sound| !sound.mono().is_empty()).ok_or(Error::Unsupported("a track without samples"))
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
        for content in [&b""[..], b"not audio at all, but a sentence", &wav(8000, 1, &[])] {
            std::fs::write(&path, content).unwrap();
            assert!(message(&path).contains("text.wav: "), "{}", message(&path));
        }
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
        for (from, to) in [(44_100, 16_000), (8_000, 16_000), (48_000, 24_000)] {
            let got = tone(440.0, from).resampled(to).unwrap();
            let want = tone(440.0, to);
            assert_eq!((got.rate, got.channels[0].len()), (to, to as usize));
            let error = largest(&got.channels[0], &want.channels[0]);
            assert!(error < 1e-4, "{from} to {to}: {error}");
        }
        let silence = vec![0.0; 16_000];
        assert!(largest(&tone(9_500.0, 44_100).resampled(16_000).unwrap().channels[0], &silence) < 1e-3);
        assert!(Sound { channels: vec![vec![0.5]], rate: 8000 }.resampled(0).is_err());
    }
}
