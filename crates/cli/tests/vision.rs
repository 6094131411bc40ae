//! Pictures through the real program: what each kind of model says of them and draws on them, and what is said of
//! pictures and settings that are not right.
#![cfg(feature = "vision")]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use roofbench_vision::image::{self, DynamicImage, ImageFormat, Rgb, RgbImage};
use serde_json::{Value, json};
use support::{Ran, checkpoint, fixtures, roofbench, words};
use tempfile::{TempDir, tempdir};

/// A folder with pictures and, in `model`, the checkpoint of a reference case with synthetic values.
fn with_model(case: &str, changes: Value, processor: Value) -> TempDir {
    let folder = tempdir().unwrap();
    let read =
        |file: &str| -> Value { serde_json::from_slice(&fs::read(fixtures().join(case).join(file)).unwrap()).unwrap() };
    let mut config = read("config.json");
    for (field, value) in changes.as_object().into_iter().flatten() {
        config[field] = value.clone();
    }
    let shapes: BTreeMap<String, Vec<usize>> = serde_json::from_value(read("tensors.json")).unwrap();
    let model = folder.path().join("model");
    checkpoint(&model, &config, &shapes.into_iter().collect::<Vec<_>>());
    fs::write(model.join("preprocessor_config.json"), processor.to_string()).unwrap();
    photo().save(folder.path().join("photo.png")).unwrap();
    RgbImage::from_pixel(50, 40, Rgb([9, 200, 30])).save(folder.path().join("other.png")).unwrap();
    folder
}

fn photo() -> RgbImage {
    RgbImage::from_fn(70, 50, |x, y| Rgb([(x * 3) as u8, (y * 5) as u8, (x * y) as u8]))
}

fn run(folder: &Path, flags: &str) -> Ran {
    let common = "run --weights model --threads 1 --max-samples 2 --min-time 0 --max-time 1 --output r.jsonl";
    roofbench(folder, words(&format!("{common} {flags}")))
}

/// Rows of the first table in what was printed, without the header.
fn rows(ran: &Ran) -> Vec<Vec<String>> {
    let table = ran.out.lines().skip_while(|line| !line.starts_with('┌')).take_while(|line| !line.starts_with('└'));
    let rows = table.filter(|line| line.starts_with('│'));
    rows.skip(1).map(|line| line.trim_matches('│').split('┆').map(|cell| cell.trim().to_owned()).collect()).collect()
}

/// The picture at `name`, which was drawn on `photo.png`.
#[track_caller]
fn drawn(folder: &Path, name: &str) -> RgbImage {
    let picture = image::open(folder.join(name)).unwrap().to_rgb8();
    assert_eq!(picture.dimensions(), photo().dimensions());
    assert_ne!(picture, photo(), "nothing is drawn");
    picture
}

fn detr() -> Value {
    json!({"image_processor_type": "DetrImageProcessor", "size": {"shortest_edge": 48, "longest_edge": 96}})
}

fn sam() -> Value {
    json!({
        "image_processor_type": "SamImageProcessor", "size": {"longest_edge": 40}, "pad_size": {"height": 40, "width": 40},
    })
}

fn square(side: u32) -> Value {
    json!({"image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}})
}

#[test]
fn a_detector_gives_boxes_and_draws_them() {
    let names: BTreeMap<String, String> = (0..7).map(|i| (i.to_string(), format!("thing {i}"))).collect();
    let folder = with_model("detr/resnet-backbone", json!({"id2label": names}), detr());
    let ran = run(folder.path(), "--image photo.png --arg threshold=0 --save out.png");
    let ran = ran.expect(0, &["pixel_mask [1, 48, 67]", "label", "score", "thing ", "wrote ", "out.png"]);
    let scores: Vec<f32> = rows(&ran).iter().map(|row| row[2].trim_end_matches(" %").parse().unwrap()).collect();
    assert!(scores.len() > 1 && scores.is_sorted_by(|a, b| a >= b), "{scores:?}");
    drawn(folder.path(), "out.png");
    run(folder.path(), "--image photo.png --arg threshold=1").expect(0, &["nothing scores above 1"]);
    run(folder.path(), "--image photo.png --arg threshold=high").expect(1, &["`threshold`", "expected a number"]);
    run(folder.path(), "--image photo.png --arg treshold=0.1").expect(1, &["`treshold`", "is not supported"]);
    // a file for each of several pictures
    run(folder.path(), "--image photo.png --image other.png --arg threshold=0 --save two.png")
        .expect(0, &["two-1.png", "two-2.png"]);
    drawn(folder.path(), "two-1.png");
    assert_eq!(image::image_dimensions(folder.path().join("two-2.png")).unwrap(), (50, 40));
}

#[test]
fn a_segmenter_gives_areas_and_draws_them() {
    let folder = with_model("detr/segmentation", json!({}), detr());
    let flags = "--image photo.png --arg threshold=0 --arg mask_threshold=0 --arg overlap_mask_area_threshold=0";
    let ran = run(folder.path(), &format!("{flags} --save out.webp")).expect(0, &["segment", "LABEL_", "area"]);
    let areas: f32 = rows(&ran).iter().filter_map(|row| row[4].trim_end_matches(" %").parse::<f32>().ok()).sum();
    assert!((90.0..=101.0).contains(&areas), "every pixel has a segment: {areas} % in {}", ran.out);
    drawn(folder.path(), "out.webp");
    run(folder.path(), "--image photo.png").expect(0, &["nothing scores above 0.5", "--arg threshold"]);
}

#[test]
fn sam_gives_masks_for_points_and_boxes() {
    let folder = with_model("sam/points", json!({}), sam());
    let ran = run(folder.path(), "--image photo.png --save out.png --arg input_points=[[[[20,10]],[[60,40]]]]");
    let ran = ran.expect(0, &["input_points [1, 2, 1, 2]", "expected IoU", "wrote "]);
    // three masks for each of two prompts
    let prompts: Vec<_> = rows(&ran).into_iter().map(|row| (row[1].clone(), row[2].clone())).collect();
    assert_eq!(prompts.len(), 6, "{}", ran.out);
    assert_eq!((prompts[0].0.as_str(), prompts[5].0.as_str(), prompts[5].1.as_str()), ("1", "2", "3"));
    // the first point is marked in the first colour
    let point = *drawn(folder.path(), "out.png").get_pixel(20, 10);
    assert_eq!(point, Rgb([230, 159, 0]));

    run(
        folder.path(),
        "--image photo.png --arg input_boxes=[[[5,5,60,40]]] --arg multimask_output=false --save box.png",
    )
    .expect(0, &["input_boxes [1, 1, 4]"]);
    drawn(folder.path(), "box.png");
    run(folder.path(), "--image photo.png").expect(0, &["the centre of each picture", "input_points [1, 1, 1, 2]"]);
    run(folder.path(), "--image photo.png --arg input_points=[20,10]")
        .expect(1, &["`input_points`", "[picture][prompt]"]);
    run(folder.path(), "--image photo.png --arg input_points=here").expect(1, &["`input_points`", "lists"]);
    run(folder.path(), "--image photo.png --arg input_labels=[[1]]").expect(1, &["`input_labels`", "input_points"]);
}

#[test]
fn features_are_compared() {
    let processor = json!({"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 48},
                           "crop_size": {"height": 42, "width": 42}});
    let folder = with_model("dinov2/encoder", json!({}), processor);
    let ran = run(folder.path(), "--image photo.png --image other.png --image photo.png");
    let table = rows(&ran.expect(0, &["cosine similarity", "photo.png"]));
    assert_eq!((table[0][2].as_str(), table[0][4].as_str(), table[2][2].as_str()), ("1.0000", "1.0000", "1.0000"));
    assert_ne!(table[0][3], "1.0000");
    let one = rows(&run(folder.path(), "--image photo.png").expect(0, &["width of the embedding", "length"]));
    assert!(one[0][2].parse::<f32>().unwrap() > 0.0, "{one:?}");
}

#[test]
fn labels_are_as_many_as_are_asked_for() {
    let folder = with_model("vit/image-classification", json!({}), square(32));
    let count = |flags: &str| rows(&run(folder.path(), flags).expect(0, &["probability"])).len();
    assert_eq!((count("--image photo.png"), count("--image photo.png --arg top_k=2")), (5, 2));
    run(folder.path(), "--image photo.png --arg top_k=0").expect(1, &["`top_k`", "number of labels"]);
}

#[test]
fn pictures_that_can_not_be_read_are_named() {
    let folder = with_model("vit/image-classification", json!({}), square(32));
    let encoded = |format: ImageFormat| {
        let mut bytes = std::io::Cursor::new(Vec::new());
        let picture = DynamicImage::from(photo());
        // a GIF is made of pixels with an alpha channel
        let picture = if format == ImageFormat::Gif { picture.to_rgba8().into() } else { picture };
        picture.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    };
    let (png, jpeg) = (encoded(ImageFormat::Png), encoded(ImageFormat::Jpeg));
    let sized = |width: u16, height: u16| {
        let mut gif = encoded(ImageFormat::Gif);
        gif[6..8].copy_from_slice(&width.to_le_bytes());
        gif[8..10].copy_from_slice(&height.to_le_bytes());
        gif
    };
    let cases: &[(&str, Vec<u8>, &str)] = &[
        ("half.png", png[..png.len() / 2].to_vec(), "can't be decoded"),
        ("half.jpg", jpeg[..jpeg.len() / 2].to_vec(), "truncated"),
        ("empty.png", Vec::new(), "not a picture"),
        ("text.png", b"a boat, in words".to_vec(), "JPEG, PNG, WebP, GIF"),
        ("nothing.gif", sized(0, 5), "empty"),
        ("bomb.gif", sized(60_000, 60_000), "more than the limit"),
    ];
    for (name, bytes, said) in cases {
        fs::write(folder.path().join(name), bytes).unwrap();
        run(folder.path(), &format!("--image photo.png --image {name}")).expect(1, &[name, said]);
    }
    fs::create_dir(folder.path().join("album.png")).unwrap();
    run(folder.path(), "--image album.png").expect(1, &["album.png"]);
}

#[test]
fn a_processor_that_contradicts_the_model_is_named() {
    let folder = with_model("vit/image-classification", json!({}), square(24));
    let said = ["preprocessor_config.json", "`size`", "24 x 24", "32 x 32", "interpolate_pos_encoding=true"];
    run(folder.path(), "--image photo.png").expect(1, &said);
    run(folder.path(), "--image photo.png --arg interpolate_pos_encoding=true").expect(0, &["probability"]);
    let sizes = json!({"image_processor_type": "ViTImageProcessor", "do_resize": false});
    fs::write(folder.path().join("model/preprocessor_config.json"), sizes.to_string()).unwrap();
    run(folder.path(), "--image photo.png").expect(1, &["`do_resize`", "50 x 70", "32 x 32"]);
    for (field, value, said) in [
        ("size", json!({"height": 0, "width": 32}), "0 x 32"),
        ("size", json!({"height": 99_999, "width": 99_999}), "99999 x 99999"),
        ("image_mean", json!([0.5]), "three of them"),
        ("image_std", json!([0, 0, 0]), "image_std"),
        ("resample", json!(99), "99"),
    ] {
        let mut wrong = square(32);
        wrong[field] = value;
        fs::write(folder.path().join("model/preprocessor_config.json"), wrong.to_string()).unwrap();
        run(folder.path(), "--image photo.png").expect(1, &["preprocessor_config.json", &format!("`{field}"), said]);
    }

    let mut small = sam();
    small["pad_size"] = json!({"height": 64, "width": 64});
    let folder = with_model("sam/points", json!({}), small);
    run(folder.path(), "--image photo.png").expect(1, &["`pad_size`", "64 x 64", "40 x 40"]);
}

#[test]
fn colours_that_the_model_does_not_take_are_named() {
    // a model of grey pictures, whose projection has one channel
    let folder = with_model("vit/image-classification", json!({}), square(32));
    let model = folder.path().join("model");
    let read = |path: &Path| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let mut config = read(&model.join("config.json"));
    config["num_channels"] = 1.into();
    let case = fixtures().join("vit/image-classification");
    let mut shapes: BTreeMap<String, Vec<usize>> = serde_json::from_value(read(&case.join("tensors.json"))).unwrap();
    shapes.get_mut("vit.embeddings.patch_embeddings.projection.weight").unwrap()[1] = 1;
    checkpoint(&model, &config, &shapes.into_iter().collect::<Vec<_>>());
    run(folder.path(), "--image photo.png")
        .expect(1, &["config.json", "`num_channels`", "is 1", "red, green and blue"]);
}

#[test]
fn files_to_save_to_are_checked_before_anything_is_measured() {
    let folder = with_model("detr/resnet-backbone", json!({}), detr());
    let run = |flags: &str| run(folder.path(), &format!("--image photo.png --arg threshold=0 {flags}"));
    run("--save no/such/out.png").expect(1, &["no/such/out.png", "can't be written (--save)"]);
    run("--save out.bmp").expect(1, &["out.bmp", ".png, .jpg"]);
    run("--save model").expect(1, &["model", ".png, .jpg"]);
    fs::create_dir(folder.path().join("folder.png")).unwrap();
    run("--save folder.png").expect(1, &["folder.png", "can't be written"]);
    assert!(!folder.path().join("out.bmp").exists());

    let folder = with_model("vit/image-classification", json!({}), square(32));
    let ran = self::run(folder.path(), "--image photo.png --save out.png");
    ran.expect(1, &["--save", "ViTForImageClassification gives nothing to draw", "SamModel"]);
    assert!(!folder.path().join("out.png").exists());
}

#[test]
fn hidden_patches_are_drawn_by_the_model() {
    // four by four patches are left, which strides of 8 draw in full
    let changes = json!({"architectures": ["SwinForMaskedImageModeling"], "encoder_stride": 8});
    let folder = with_model("swin/image-classification", changes, square(32));
    let (model, case) = (folder.path().join("model"), fixtures().join("swin/image-classification"));
    let read = |path: &Path| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let mut shapes: BTreeMap<String, Vec<usize>> = serde_json::from_value(read(&case.join("tensors.json"))).unwrap();
    shapes.retain(|name, _| !name.starts_with("classifier."));
    let of_the_head = [
        ("swin.embeddings.mask_token", vec![1, 1, 16]),
        ("decoder.0.weight", vec![192, 64, 1, 1]),
        ("decoder.0.bias", vec![192]),
    ];
    shapes.extend(of_the_head.map(|(name, shape)| (name.to_owned(), shape)));
    checkpoint(&model, &read(&model.join("config.json")), &shapes.into_iter().collect::<Vec<_>>());
    let ran = run(folder.path(), "--image photo.png").expect(0, &["bool_masked_pos [1, 256]", "every other square"]);
    let loss = ran.out.split("off by ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    assert!(loss.parse::<f32>().is_ok_and(|loss| loss > 0.0), "{loss}");
}
