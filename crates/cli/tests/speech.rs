//! The real program on sound: what people get of each kind of model, and what it says to files that are none.

#![cfg(feature = "speech")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use roofbench_core::record::{Outcome, Record};
use roofbench_core::session::Phase;
use serde_json::{Value, json};
use support::{Ran, checkpoint, fixtures, records, roofbench, tokenizer, words};
use tempfile::{TempDir, tempdir};

fn speech(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../speech").join(path).display().to_string()
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The model of a reference case in `folder`, with the preparation that its repository would have.
fn model(folder: &Path, case: &str, preprocessor: Value) {
    let case = fixtures().join(case);
    let shapes: std::collections::BTreeMap<String, Vec<usize>> =
        serde_json::from_value(json_of(&case.join("tensors.json"))).unwrap();
    checkpoint(folder, &json_of(&case.join("config.json")), &shapes.into_iter().collect::<Vec<_>>());
    if case.join("generation_config.json").exists() {
        fs::copy(case.join("generation_config.json"), folder.join("generation_config.json")).unwrap();
    }
    fs::write(folder.join("preprocessor_config.json"), preprocessor.to_string()).unwrap();
}

fn with_model(case: &str, preprocessor: Value) -> TempDir {
    let folder = tempdir().unwrap();
    model(&folder.path().join("model"), case, preprocessor);
    folder
}

fn waveforms() -> Value {
    json!({"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 16000, "do_normalize": true})
}

/// Whisper's of a model that takes 60 spectra.
fn sixty_spectra() -> Value {
    json!({"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 20, "hop_length": 8000})
}

fn run(folder: &TempDir, flags: &[&str]) -> Ran {
    let fixed = words("run --weights model --threads 1 --max-samples 2 --max-time 1 --output r.jsonl");
    roofbench(folder.path(), fixed.iter().chain(flags))
}

fn last(folder: &TempDir) -> Record {
    records(&folder.path().join("r.jsonl")).pop().expect("a record")
}

/// A WAV file of 16-bit samples.
fn wav(path: PathBuf, rate: u32, samples: &[i16]) -> String {
    let bytes: Vec<u8> = samples.iter().flat_map(|sample| sample.to_le_bytes()).collect();
    let mut file = b"RIFF".to_vec();
    file.extend((36 + bytes.len() as u32).to_le_bytes());
    file.extend(b"WAVEfmt \x10\0\0\0\x01\0\x01\0");
    file.extend(rate.to_le_bytes());
    file.extend((2 * rate).to_le_bytes());
    file.extend(b"\x02\0\x10\0data");
    file.extend((bytes.len() as u32).to_le_bytes());
    file.extend(bytes);
    fs::write(&path, file).unwrap();
    path.display().to_string()
}

fn tone(rate: u32, seconds: u32) -> Vec<i16> {
    (0..rate * seconds).map(|i| (8000.0 * (i as f32 * 0.3).sin()) as i16).collect()
}

#[test]
fn what_is_said_is_written_down() {
    let folder = with_model("wav2vec2/ctc-base", waveforms());
    let sample = speech("samples/speech.flac");
    run(&folder, &["--audio", &sample]).expect(0, &["no vocab.json beside the weights", "speech.flac"]);

    let letter = |id: u8| {
        if id == 0 {
            "<pad>".to_owned()
        } else {
            char::from(b'!' + id % 90).to_string().repeat(1 + usize::from(id / 90))
        }
    };
    let vocab: serde_json::Map<String, Value> = (0..99).map(|id| (letter(id), id.into())).collect();
    fs::write(folder.path().join("model/vocab.json"), Value::Object(vocab).to_string()).unwrap();
    let ran = run(&folder, &["--audio", &sample]).expect(0, &["audio decoding and feature extraction:", "text"]);
    let record = last(&folder);
    assert_eq!(
        (record.subject.cell.name.as_str(), record.subject.cell.unit.as_str()),
        ("forward/audio/b1", "audio seconds")
    );
    assert!((record.subject.cell.amount.unwrap() - 52_399.0 / 16_000.0).abs() < 1e-9, "{:?}", record.subject.cell);
    assert_eq!(record.subject.cell.inputs["input_values"].shape(), [1, 52_399]);
    assert!(ran.out.contains("audio seconds/s"), "{}", ran.out);

    // in windows of a second the measured call is the first of them
    let ran = run(&folder, &["--audio", &sample, "--arg", "chunk=1"]);
    ran.expect(0, &["windows", "latency p50", "RTFx", "3.27"]);
    assert_eq!(last(&folder).subject.cell.amount, Some(1.0));
    run(&folder, &["--audio", &sample, "--arg", "chunk=0"]).expect(1, &["chunk", "expected 1 to 60 seconds"]);
    run(&folder, &["--audio", &sample, "--save", "x.wav"]).expect(1, &["--save", "Wav2Vec2ForCTC makes no sound"]);
    run(&folder, &["--text", "a"]).expect(2, &["--text", "takes no text"]);
}

#[test]
fn whisper_hears_long_sounds_window_by_window() {
    let folder = with_model("whisper/detected-language-generate", sixty_spectra());
    tokenizer(&folder.path().join("model/tokenizer.json"), &["a", "boat"]);
    let long = wav(folder.path().join("long.wav"), 8000, &tone(8000, 65));
    run(&folder, &["--audio", &speech("samples/speech.flac"), "--arg", "language=french"])
        .expect(0, &["input_features [1, 20, 60]", "seconds", "text"]);
    assert!((last(&folder).subject.cell.amount.unwrap() - 3.275).abs() < 0.001);
    run(&folder, &["--audio", &long]).expect(0, &["65.00", "windows", "RTFx"]);
    assert_eq!(last(&folder).subject.cell.amount, Some(30.0));
    // without times every window follows the one before it
    let ran = run(&folder, &["--audio", &long, "--arg", "return_timestamps=false"]).expect(0, &["60.00 to 65.00"]);
    assert!(ran.out.contains("30.00 to 60.00"), "{}", ran.out);
    run(&folder, &["--audio", &long, "--arg", "language=klingon"]).expect(1, &["language", "klingon"]);
}

#[test]
fn a_text_is_spoken_to_a_file_that_plays() {
    let folder = with_model("speecht5/text-to-speech-generate", json!({"num_mel_bins": 10}));
    let text = ["--text", "the boat sails", "--arg", "maxlenratio=6", "--arg", "threshold=9"];
    run(&folder, &text).expect(1, &["spm_char.model or tokenizer.json"]);
    tokenizer(&folder.path().join("model/tokenizer.json"), &["the", "boat", "sails"]);
    run(&folder, &text).expect(0, &["with the vocoder they are heard"]);
    let save = ["--save", "out.wav"];
    run(&folder, &[&text[..], &save].concat()).expect(1, &["--save", "the folder `vocoder`"]);

    model(&folder.path().join("model/vocoder"), "speecht5/vocoder", json!({}));
    run(&folder, &[&text[..], &save].concat()).expect(0, &["s of speech", "wrote", "out.wav"]);
    let record = last(&folder);
    let Outcome::Measured(measurement) = &record.outcome else { panic!("{:?}", record.outcome) };
    assert!(measurement.cost.iter().any(|cost| cost.phase == Phase::Forward && cost.cost.flops > 0));
    assert!(measurement.samples.iter().all(|s| s.phases.last().is_some_and(|(phase, _)| *phase == Phase::Forward)));
    // 3 tokens and a ratio of 6: 9 steps of 2 spectra, 12 samples of each
    let seconds = 216.0 / 16_000.0;
    assert!((record.subject.cell.amount.unwrap() - seconds).abs() < 1e-9, "{:?}", record.subject.cell.amount);
    run(&folder, &[&text[..], &["--text", "again"]].concat()).expect(1, &["--text", "one text at a time"]);

    model(&folder.path().join("model"), "encodec/mono-causal", json!({"sampling_rate": 24000}));
    run(&folder, &["--audio", "out.wav"]).expect(0, &["kbit/s", "0.01"]);
}

#[test]
fn every_format_goes_through_a_codec_and_back() {
    let folder = with_model("encodec/mono-causal", json!({"sampling_rate": 24000}));
    for file in ["tone.wav", "tone.flac", "tone.mp3", "tone.ogg", "tone.aac", "tone.m4a"] {
        let file = speech(&format!("tests/fixtures/{file}"));
        // half a second is 37.5 frames, so 38 of them, and more where an encoder added silence
        run(&folder, &["--audio", &file, "--arg", "bandwidth=12"]).expect(0, &["kbit/s", "dB"]);
    }
    let two = [&speech("tests/fixtures/tone.wav"), &speech("samples/speech.flac")];
    let flags = ["--audio", two[0], "--audio", two[1], "--save", "out.wav"];
    run(&folder, &flags).expect(0, &["wrote", "out-1.wav", "out-2.wav"]);
    run(&folder, &["--audio", "out-2.wav", "--arg", "chunk=1"]).expect(0, &["kbit/s", "windows", "3.27"]);
    run(&folder, &["--audio", two[0], "--arg", "bandwidth=7"]).expect(1, &["bandwidth", "6, 12, 24"]);
    run(&folder, &["--audio", two[0], "--opt", "+overlapped-decoding"]).expect(0, &["overlapped-decoding", "dB"]);
}

#[test]
fn voices_are_compared_and_states_described() {
    let folder = with_model("wavlm/speaker-verification", waveforms());
    let (sample, other) =
        (speech("samples/speech.flac"), wav(folder.path().join("tone.wav"), 16_000, &tone(16_000, 1)));
    let ran = run(&folder, &["--audio", &sample, "--audio", &other, "--audio", &sample]);
    let ran = ran.expect(0, &["cosine similarity"]);
    assert!(ran.out.lines().any(|line| line.contains(" 1 ") && line.matches("1.0000").count() >= 2), "{}", ran.out);
    run(&folder, &["--audio", &sample, "--arg", "chunk=1"]).expect(1, &["chunk", "hears a sound as a whole"]);
    // two hours, of which no more than a minute is read
    let hours = wav(folder.path().join("hours.wav"), 100, &tone(100, 7200));
    run(&folder, &["--audio", &hours]).expect(1, &["hours.wav", "longer than the 60 s", "cut it"]);

    let folder = with_model("hubert/model", waveforms());
    run(&folder, &["--audio", &sample]).expect(0, &["frames x hidden", "standard deviation"]);
    let folder = with_model("wav2vec2/sequence-classification", waveforms());
    run(&folder, &["--audio", &sample]).expect(0, &["label", "probability"]);
    let folder = with_model("wavlm/frame-classification", waveforms());
    run(&folder, &["--audio", &sample]).expect(0, &["active", "s of 3.27 s"]);
}

#[test]
fn files_that_are_no_sound_are_named() {
    let folder = with_model("wav2vec2/ctc-base", waveforms());
    let at = |name: &str| folder.path().join(name);
    fs::write(at("empty.wav"), b"").unwrap();
    fs::write(at("misnamed.mp3"), b"no sound, but a sentence that goes on for a while ".repeat(50)).unwrap();
    let whole = fs::read(speech("samples/speech.flac")).unwrap();
    fs::write(at("truncated.flac"), &whole[..whole.len() / 2]).unwrap();
    wav(at("rate.wav"), 0, &[1; 4000]);
    for (file, reason) in
        [("empty.wav", "no audio"), ("misnamed.mp3", "MP3"), ("truncated.flac", "ends too early"), ("rate.wav", "rate")]
    {
        run(&folder, &["--audio", file]).expect(1, &[file, reason]);
    }
    wav(at("short.wav"), 16_000, &[5; 10]);
    run(&folder, &["--audio", "short.wav"]).expect(1, &["a sound of 10 samples is shorter than a frame"]);
    let folder = with_model("whisper/detected-language-generate", sixty_spectra());
    wav(folder.path().join("short.wav"), 16_000, &[5; 10]);
    // Whisper has silence behind it
    run(&folder, &["--audio", "short.wav"]).expect(0, &["0.00 to 0.00"]);
}
