//! Videos as people have them without a video decoder: folders of frames, and animated GIFs.

use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};

use roofbench_core::session::SessionError;
use roofbench_vision::image::codecs::gif::GifDecoder;
use roofbench_vision::image::{AnimationDecoder, DynamicImage, ImageDecoder, ImageError, RgbImage};
use roofbench_vision::image_io::{MAX_PIXELS, Transparency, load_rgb};

use crate::imagebind_processor::evenly;

/// What names of picture files end in.
const PICTURES: [&str; 5] = ["png", "jpg", "jpeg", "webp", "gif"];

/// A video: a folder of pictures, or an animated GIF.
pub fn is_video(path: &Path) -> bool {
    path.is_dir() || has_extension(path, &["gif"])
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
    extension.is_some_and(|extension| extensions.contains(&extension.as_str()))
}

fn refuse(path: &Path, reason: impl Into<String>) -> SessionError {
    SessionError::File { path: path.to_owned(), reason: reason.into() }
}

/// The pictures in a folder, in the order of their names: `frame-2.png` before `frame-10.png`.
///
/// # Errors
/// The folder can't be read, or holds no picture.
pub fn in_folder(folder: &Path) -> Result<Vec<PathBuf>, SessionError> {
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let entries = entries.map_err(|error| refuse(folder, error.to_string()))?;
    let mut files: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
    files.retain(|path| path.is_file() && has_extension(path, &PICTURES));
    if files.is_empty() {
        return Err(refuse(folder, format!("holds no frames: files that end in {}", PICTURES.join(", "))));
    }
    alphanumeric_sort::sort_path_slice(&mut files);
    Ok(files)
}

/// `wanted` frames of the video at `path`, from the first to the last at even distances; some of them twice where it has
/// fewer.
///
/// # Errors
/// Names the file that can't be read.
pub fn sampled(path: &Path, wanted: usize) -> Result<Vec<RgbImage>, SessionError> {
    match path.is_dir() {
        true => of_files(&in_folder(path)?, wanted),
        false => of_gif(path, wanted),
    }
}

/// `wanted` of `files`, which are the frames of one video.
///
/// # Errors
/// Names the file that can't be read.
pub fn of_files(files: &[PathBuf], wanted: usize) -> Result<Vec<RgbImage>, SessionError> {
    evenly(files.len(), wanted).map(|i| Ok(load_rgb(&files[i], Transparency::Dropped)?)).collect()
}

fn of_gif(path: &Path, wanted: usize) -> Result<Vec<RgbImage>, SessionError> {
    let damaged = |error: ImageError| refuse(path, format!("can't be decoded: {error}"));
    let open = || {
        let file = File::open(path).map_err(|error| refuse(path, error.to_string()))?;
        let decoder = GifDecoder::new(BufReader::new(file)).map_err(damaged)?;
        let (width, height) = decoder.dimensions();
        if u64::from(width) * u64::from(height) > MAX_PIXELS {
            return Err(refuse(path, format!("{height} x {width} pixels are more than the limit of {MAX_PIXELS}")));
        }
        Ok(decoder.into_frames())
    };
    // once to count them, so that no more are in memory than are wanted
    let count = open()?.try_fold(0, |count, frame| frame.map(|_| count + 1)).map_err(damaged)?;
    if count == 0 {
        return Err(refuse(path, "holds no frames"));
    }
    let places: Vec<usize> = evenly(count, wanted).collect();
    let mut frames = Vec::with_capacity(wanted);
    for (place, frame) in open()?.enumerate() {
        let times = places.iter().filter(|wanted| **wanted == place).count();
        if times > 0 {
            let picture = DynamicImage::ImageRgba8(frame.map_err(damaged)?.into_buffer()).into_rgb8();
            frames.extend(std::iter::repeat_n(picture, times));
        }
    }
    Ok(frames)
}

#[cfg(test)]
mod tests {
    use roofbench_vision::image::codecs::gif::GifEncoder;
    use roofbench_vision::image::{Frame, Rgb, Rgba, RgbaImage};

    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("roofbench-frames-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        folder
    }

    fn reds(frames: &[RgbImage]) -> Vec<u8> {
        frames.iter().map(|frame| frame.get_pixel(0, 0).0[0]).collect()
    }

    #[test]
    fn frames_of_a_folder_come_in_the_order_of_their_numbers() -> Result<(), SessionError> {
        let folder = folder("folder");
        for number in [10u8, 2, 1, 9] {
            let picture = RgbImage::from_pixel(2, 2, Rgb([number, 0, 0]));
            picture.save(folder.join(format!("frame-{number}.png"))).expect("a picture");
        }
        fs::write(folder.join("notes.txt"), "no frame").expect("a file");
        assert_eq!(reds(&sampled(&folder, 4)?), [1, 2, 9, 10]);
        assert_eq!(reds(&sampled(&folder, 2)?), [1, 10]);
        fs::remove_dir_all(&folder).expect("gone");
        Ok(())
    }

    #[test]
    fn frames_of_a_gif_are_all_there() -> Result<(), SessionError> {
        let folder = folder("gif");
        let path = folder.join("moving.gif");
        {
            let mut encoder = GifEncoder::new(File::create(&path).expect("a file"));
            let frame = |red: u8| Frame::new(RgbaImage::from_pixel(4, 4, Rgba([red, 0, 0, 255])));
            encoder.encode_frames([0u8, 128, 255].map(frame)).expect("frames");
        }
        assert!(is_video(&path));
        assert_eq!(reds(&sampled(&path, 3)?), [0, 128, 255]);
        assert_eq!(sampled(&path, 5)?.len(), 5);
        fs::write(&path, b"GIF89a").expect("a file");
        let error = sampled(&path, 2).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains("moving.gif: can't be decoded"), "{error}");
        fs::remove_dir_all(&folder).expect("gone");
        Ok(())
    }
}
