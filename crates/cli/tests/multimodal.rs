//! Multimodal tasks through the real program: small checkpoints, pictures and sounds in, answers and refusals out.

#![cfg(feature = "multimodal")]

mod support;

use std::fs;
use std::path::Path;

use roofbench_core::record::{Measurement, Outcome};
use roofbench_core::session::Phase;
use serde_json::{Map, Value, json};
use support::{Ran, checkpoint, fixtures, records, roofbench, words};
use tempfile::{TempDir, tempdir};

/// Places of tokens that have names; all others up to the vocabulary's end are called by their number.
const NAMED: [(&str, u64); 13] = [
    ("[PAD]", 0),
    ("[CLS]", 1),
    ("[SEP]", 2),
    ("[UNK]", 3),
    ("a", 4),
    ("boat", 5),
    ("total", 6),
    ("due", 7),
    ("<s_docvqa>", 94),
    ("<s_question>", 95),
    ("</s_question>", 96),
    ("<s_answer>", 97),
    ("<image>", 98),
];

/// A tokenizer of whole words with [`NAMED`] ones and `vocab` in all.
fn tokenizer(path: &Path, vocab: u64) {
    let mut vocabulary: Map<String, Value> = (0..vocab).map(|id| (format!("t{id}"), id.into())).collect();
    let mut added = Vec::new();
    for (content, id) in NAMED.into_iter().filter(|(_, id)| *id < vocab) {
        vocabulary.remove(&format!("t{id}"));
        vocabulary.insert(content.to_owned(), id.into());
        if !content.chars().all(char::is_alphabetic) {
            added.push(json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                              "normalized": false, "special": content.starts_with('[')}));
        }
    }
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "decoder": null,
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    });
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, tokenizer.to_string()).unwrap();
}

/// A folder with the checkpoint of a reference case in `model`, of made-up weights, and `photo.png`.
fn with_model(case: &str, preprocessor: Value) -> TempDir {
    let read = |file: &str| -> Value {
        serde_json::from_str(&fs::read_to_string(fixtures().join(case).join(file)).unwrap()).unwrap()
    };
    let mut config = read("config.json");
    config["architectures"] = json!([read("case.json")["class"]]);
    let shape = |shape: &Value| shape.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
    let tensors: Vec<(String, Vec<usize>)> =
        read("tensors.json").as_object().unwrap().iter().map(|(name, x)| (name.clone(), shape(x))).collect();
    let folder = tempdir().unwrap();
    let model = folder.path().join("model");
    checkpoint(&model, &config, &tensors);
    tokenizer(&model.join("tokenizer.json"), 99);
    fs::write(model.join("preprocessor_config.json"), preprocessor.to_string()).unwrap();
    photo(&folder.path().join("photo.png"));
    folder
}

fn photo(to: &Path) {
    fs::copy(fixtures().join("clip/preprocess-landscape/image.png"), to).unwrap();
}

/// Pictures of `side` pixels.
fn square(side: u64) -> Value {
    json!({"image_processor_type": "CLIPImageProcessor", "do_center_crop": false,
           "size": {"height": side, "width": side}})
}

/// Runs `model` with these arguments, as few times as can be.
fn run(folder: &TempDir, arguments: &[&str]) -> Ran {
    let short = words("run --weights model --threads 1 --max-samples 2 --max-time 1 --output r.jsonl");
    roofbench(folder.path(), short.iter().chain(arguments))
}

/// What was measured last.
fn measured(folder: &TempDir) -> Measurement {
    let record = records(&folder.path().join("r.jsonl")).pop().unwrap();
    match record.outcome {
        Outcome::Measured(measurement) => *measurement,
        other => panic!("{other:?}"),
    }
}

fn phases(measurement: &Measurement) -> Vec<Phase> {
    measurement.samples[0].phases.iter().map(|(phase, _)| *phase).collect()
}

fn flops(measurement: &Measurement, phase: Phase) -> u64 {
    measurement.cost.iter().filter(|cost| cost.phase == phase).map(|cost| cost.cost.flops).sum()
}

#[test]
fn clip_tells_texts_apart_and_its_towers_too() {
    let folder = with_model("clip/end-token-pooling", square(32));
    let texts = ["--text", "a boat", "--text", "total due"];
    let ran = run(&folder, &[&["--image", "photo.png"][..], &texts].concat());
    ran.expect(0, &["photo.png", "a boat", "total due", "probability", "preprocessing: ", "vision", "text", "share"]);
    let measurement = measured(&folder);
    assert_eq!(phases(&measurement), [Phase::Vision, Phase::Text, Phase::Forward]);
    assert!([Phase::Vision, Phase::Text, Phase::Forward].iter().all(|phase| flops(&measurement, *phase) > 0));
    run(&folder, &["--text", "a boat"]).expect(1, &["--image", "CLIPModel needs one"]);
    run(&folder, &["--image", "model/config.json", "--text", "a"]).expect(1, &["config.json", "not a picture"]);
    run(&folder, &["--audio", "photo.png"]).expect(2, &["--audio: clip takes no sound"]);
    let saved = ["--image", "photo.png", "--text", "a", "--save", "out.png"];
    run(&folder, &saved).expect(1, &["--save", "nothing to draw"]);
}

#[test]
fn several_questions_about_a_picture_see_it_once() {
    let folder = with_model("blip/question-answering-generate", square(32));
    let questions = ["--image", "photo.png", "--text", "a boat", "--text", "total due a", "--arg", "max_new_tokens=2"];
    run(&folder, &questions).expect(0, &["question", "answer", "total due a"]);
    let shared = measured(&folder);
    let expected = [Phase::Vision, Phase::Text, Phase::Prefill];
    assert_eq!(phases(&shared)[..3], expected);
    run(&folder, &[&questions[..], &["--opt=-shared-pictures"]].concat()).expect(0, &[]);
    let apart = measured(&folder);
    // but for the norm behind the tower, which either runs over the states of both
    let ratio = flops(&apart, Phase::Vision) as f64 / flops(&shared, Phase::Vision) as f64;
    assert!((1.9..2.0).contains(&ratio), "{ratio}");
    assert_eq!(flops(&apart, Phase::Text), flops(&shared, Phase::Text));
    let uneven = ["--image", "photo.png", "--image", "photo.png", "--text", "a", "--text", "a", "--text", "a"];
    run(&folder, &uneven).expect(1, &["--text", "3 times, --image 2 times"]);
}

#[test]
fn captions_need_no_text() {
    let folder = with_model("blip/caption-generate", square(32));
    run(&folder, &["--image", "photo.png", "--arg", "max_new_tokens=3"]).expect(0, &["caption"]);
    fs::remove_file(folder.path().join("model/tokenizer.json")).unwrap();
    run(&folder, &["--image", "photo.png", "--arg", "max_new_tokens=3"]).expect(0, &["caption", "tokens "]);
    run(&folder, &["--image", "photo.png", "--text", "a"]).expect(1, &["has no tokenizer.json"]);
    fs::remove_file(folder.path().join("model/preprocessor_config.json")).unwrap();
    run(&folder, &["--image", "photo.png"]).expect(1, &["preprocessor_config.json", "missing"]);
}

#[test]
fn llava_chats_about_several_pictures() {
    let folder = with_model("llava/llama-generate", square(24));
    let two = ["--image", "photo.png", "--image", "photo.png"];
    let short = ["--arg", "max_new_tokens=3", "--arg", "min_new_tokens=3"];
    run(&folder, &[&two[..], &["--text", "a boat"], &short].concat()).expect(0, &["pictures", "a boat", "answer"]);
    let measurement = measured(&folder);
    let expected = [Phase::Vision, Phase::Projector, Phase::Prefill, Phase::Decode, Phase::Decode];
    assert_eq!(phases(&measurement), expected);
    let template = json!({"chat_template": "{{ messages[0]['content'] | length }} {{ nothing() }}"});
    fs::write(folder.path().join("model/tokenizer_config.json"), template.to_string()).unwrap();
    run(&folder, &[&two[..], &["--text", "a boat"]].concat()).expect(1, &["tokenizer_config.json: chat_template"]);
    run(&folder, &[&two[..], &["--text", "<image> a boat"]].concat())
        .expect(1, &["names 1 pictures", "--image gives 2"]);
    run(&folder, &[&two[..], &["--text", "<image> a <image> boat"], &short].concat()).expect(0, &["answer"]);
    tokenizer(&folder.path().join("model/tokenizer.json"), 98);
    run(&folder, &[&two[..], &["--text", "<image> a <image> boat"]].concat())
        .expect(1, &["tokenizer.json", "token 98 0 times in a prompt with 2 pictures"]);
}

#[test]
fn instructblip_reads_the_instruction_twice() {
    let folder = with_model("instructblip/llama-generate", square(28));
    let ask = ["--image", "photo.png", "--text", "a boat", "--text", "total", "--arg", "max_new_tokens=2"];
    run(&folder, &ask).expect(1, &["qformer_tokenizer/tokenizer.json"]);
    tokenizer(&folder.path().join("model/qformer_tokenizer/tokenizer.json"), 61);
    run(&folder, &ask).expect(0, &["a boat", "written"]);
    let ran = run(&folder, &["--image", "photo.png"]);
    ran.expect(1, &["--text", "InstructBlipForConditionalGeneration needs one"]);
}

#[test]
fn donut_answers_in_json() {
    let page = json!({"image_processor_type": "DonutImageProcessor", "size": [29, 45]});
    let folder = with_model("donut/prompted-generate", page);
    let ask = ["--image", "photo.png", "--text", "total due", "--arg", "max_new_tokens=4"];
    let ran = run(&folder, &ask).expect(0, &["photo.png"]);
    let answer = &ran.out[ran.out.find("{\n").unwrap()..=ran.out.find("\n}").unwrap() + 1];
    let answer: Value = serde_json::from_str(answer).unwrap();
    assert_eq!(answer["question"], "total due");
    run(&folder, &["--image", "photo.png", "--text", "<s_docvqa>", "--arg", "max_new_tokens=2"]).expect(0, &["{"]);
    let uneven = ["--image", "photo.png", "--text", "a", "--text", "total due"];
    run(&folder, &uneven).expect(1, &["--text", "prompts of one length"]);
}

#[test]
fn words_with_boxes_get_labels() {
    let folder = with_model("layoutlm/token-classification", json!({"apply_ocr": false}));
    let text = ["--text", "total 12"];
    let boxes = ["--arg", "boxes=[[70, 40, 180, 60], [800, 40, 900, 60]]"];
    run(&folder, &[&text[..], &boxes].concat()).expect(0, &["word", "label", "total", "LABEL_"]);
    run(&folder, &text).expect(1, &["--arg boxes", "thousandths of the page"]);
    run(&folder, &[&text[..], &["--arg", "boxes=[[1, 2, 3, 4]]"]].concat()).expect(1, &["1 boxes for 2 words"]);
    run(&folder, &[&text[..], &["--arg", "boxes=[[1, 2, 3]]"]].concat()).expect(1, &["--arg boxes"]);
    let outside = ["--arg", "boxes=[[0, 0, 10, 10], [0, 0, 5000, 10]]"];
    run(&folder, &[&text[..], &outside].concat()).expect(1, &["bbox"]);
    run(&folder, &[&text[..], &boxes, &["--image", "photo.png"]].concat()).expect(1, &["--image", "takes none"]);
}

#[test]
fn answers_are_found_on_a_page() {
    let page = json!({"apply_ocr": false, "size": 32});
    let folder = with_model("layoutlm/v3-question-answering", page);
    let words = ["--arg", "words=[\"total\", \"12\"]", "--arg", "boxes=[[70, 40, 180, 60], [800, 40, 900, 60]]"];
    let ask = ["--image", "photo.png", "--text", "due"];
    run(&folder, &[&ask[..], &words].concat()).expect(0, &["question", "due", "probability"]);
    run(&folder, &ask).expect(1, &["--arg words", "is missing"]);
}

#[test]
fn questions_get_labels() {
    let folder = with_model("vilt/question-answering", json!({"size": 32, "size_divisor": 8}));
    let ask = ["--image", "photo.png", "--text", "a boat", "--text", "total due a"];
    run(&folder, &ask).expect(0, &["total due a", "score", "LABEL_"]);
}

#[test]
fn videos_are_folders_of_frames() {
    let folder = with_model("videomae/video-classification", square(24));
    let frames = folder.path().join("frames");
    fs::create_dir(&frames).unwrap();
    run(&folder, &["--image", "frames"]).expect(1, &["frames", "holds no frames"]);
    (0..6).for_each(|i| photo(&frames.join(format!("{i}.png"))));
    run(&folder, &["--image", "frames"]).expect(0, &["pixel_values [1, 4, 3, 24, 24]", "LABEL_", "frames"]);
    fs::write(folder.path().join("a.gif"), b"GIF89a").unwrap();
    run(&folder, &["--image", "a.gif"]).expect(1, &["a.gif", "can't be decoded"]);
    run(&folder, &["--text", "a"]).expect(2, &["--text: videomae takes no text"]);
}

#[test]
fn imagebind_compares_what_it_gets() {
    let preprocessor = json!({"size": 28, "num_mel_bins": 24, "target_length": 31, "clip_duration": 0.2});
    let folder = with_model("imagebind/image-text-audio", preprocessor);
    fs::copy(fixtures().join("imagebind/preprocess-audio/audio.wav"), folder.path().join("waves.wav")).unwrap();
    let all = ["--image", "photo.png", "--text", "a boat", "--audio", "waves.wav"];
    run(&folder, &all).expect(0, &["cosine similarity", "photo.png", "a boat", "waves.wav", "audio"]);
    assert_eq!(phases(&measured(&folder)), [Phase::Vision, Phase::Text, Phase::Audio]);
    run(&folder, &["--text", &"a ".repeat(80)]).expect(1, &["--text", "82 tokens, ImageBind takes 77"]);
    run(&folder, &["--audio", "photo.png"]).expect(1, &["photo.png"]);
}
