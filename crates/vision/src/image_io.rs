//! Picture files to upright 8-bit RGB, as `PIL.Image.open(file).convert("RGB")` gives it.
//!
//! PNG, GIF and lossless WebP give Pillow's pixels exactly. JPEG decoders differ by a level or two in the inverse
//! cosine transform and in how they enlarge the chroma planes, and so does this one from libjpeg.

use std::fs::File;
use std::io::{BufReader, Cursor, Read};
use std::path::{Path, PathBuf};

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageReader, Limits, RgbImage};
use roofbench_core::session::SessionError;

/// Pictures with more pixels are refused: Pillow's own limit for what it takes to be a decompression bomb.
pub const MAX_PIXELS: u64 = 89_478_485;

/// Bytes that a decoder may take: [`MAX_PIXELS`] of four 16-bit channels, and as much again for its own tables.
const MAX_DECODER_BYTES: u64 = 2 * 8 * MAX_PIXELS;

/// Longer files are refused: every pixel as it is in memory would be shorter.
const MAX_FILE_BYTES: u64 = 8 * MAX_PIXELS;

/// What becomes of an alpha channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transparency {
    /// It is left out; hidden colours show. Pillow's `convert("RGB")`.
    Dropped,
    /// The picture is laid over white. What image processors of `transformers` 5 do where `do_convert_rgb` is set.
    OverWhite,
}

/// Why a picture could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The file can't be opened or read.
    #[error("{}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// Its first bytes are no known format's.
    #[error("{}: not a picture that can be read; supported: JPEG, PNG, WebP, GIF", .path.display())]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// It has no pixels.
    #[error("{}: the picture is {height} x {width} pixels, which is empty", .path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// Rows.
        height: u32,
        /// Columns.
        width: u32,
    },
    /// It has too many pixels.
    #[error(
        "{}: {height} x {width} pixels are more than the limit of {MAX_PIXELS}; reduce the picture first",
        .path.display()
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Rows.
        height: u32,
        /// Columns.
        width: u32,
    },
    /// The file ends before the picture does.
    #[error("{}: the file is truncated: {format} data without its end marker", .path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Format.
        format: &'static str,
    },
    /// The data are damaged or use a variant that is not supported.
    #[error("{}: can't be decoded: {source}", .path.display())]
    Decode {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: image::ImageError,
    },
}

impl From<ImageError> for SessionError {
    fn from(error: ImageError) -> Self {
        let reason = |text: String, path: &Path| {
            text.strip_prefix(&format!("{}: ", path.display())).map_or(text.clone(), str::to_owned)
        };
        let text = error.to_string();
        match error {
            ImageError::Read { path, .. }
            | ImageError::UnknownFormat { path }
            | ImageError::Empty { path, .. }
            | ImageError::TooLarge { path, .. }
            | ImageError::Truncated { path, .. }
            | ImageError::Decode { path, .. } => Self::File { reason: reason(text, &path), path },
        }
    }
}

/// Reads the picture at `path`: the first frame of a GIF, turned upright by its EXIF orientation, in 8-bit RGB.
///
/// Grey is repeated, a palette looked up, 16-bit colour cut to its high byte. 16-bit grey (without alpha) is clipped
/// at 255, which is what Pillow does with it.
///
/// # Errors
/// [`ImageError`], naming the file.
pub fn load_rgb(path: &Path, transparency: Transparency) -> Result<RgbImage, ImageError> {
    let read = |source| ImageError::Read { path: path.into(), source };
    let mut bytes = Vec::new();
    let file = BufReader::new(File::open(path).map_err(read)?);
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(read)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(read(std::io::Error::other(format!("the file is longer than {MAX_FILE_BYTES} bytes"))));
    }
    decode_rgb(&bytes, path, transparency)
}

fn decode_rgb(bytes: &[u8], path: &Path, transparency: Transparency) -> Result<RgbImage, ImageError> {
    let fail = |source| match source {
        image::ImageError::Unsupported(_) if image::guess_format(bytes).is_err() => {
            ImageError::UnknownFormat { path: path.into() }
        }
        source => ImageError::Decode { path: path.into(), source },
    };
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|source| ImageError::Read { path: path.into(), source })?;
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_DECODER_BYTES);
    reader.limits(limits);
    let is_jpeg = reader.format() == Some(image::ImageFormat::Jpeg);
    let mut decoder = reader.into_decoder().map_err(fail)?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err(ImageError::Empty { path: path.into(), height, width });
    }
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(ImageError::TooLarge { path: path.into(), height, width });
    }
    if is_jpeg && !jpeg_is_complete(bytes) {
        return Err(ImageError::Truncated { path: path.into(), format: "JPEG" });
    }
    // a damaged orientation is no reason to refuse the picture
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut picture = DynamicImage::from_decoder(decoder).map_err(fail)?;
    picture.apply_orientation(orientation);
    Ok(to_rgb(&picture, transparency))
}

/// Whether an end marker follows the compressed data; the decoder itself fills up what is missing with grey.
fn jpeg_is_complete(bytes: &[u8]) -> bool {
    const START_OF_SCAN: u8 = 0xda;
    const END_OF_IMAGE: u8 = 0xd9;
    let mut at = 2; // after the start marker
    let mut in_scan = false;
    while let Some([first, code]) = bytes.get(at..at + 2) {
        match (first, code) {
            (0xff, 0xff) => at += 1,
            (0xff, &END_OF_IMAGE) => return true,
            // stuffed zero, restart markers
            (0xff, 0x00 | 0xd0..=0xd7) => at += 2,
            (0xff, code) => {
                let Some([high, low]) = bytes.get(at + 2..at + 4) else { return false };
                in_scan = *code == START_OF_SCAN;
                at += 2 + usize::from(u16::from_be_bytes([*high, *low]));
            }
            _ if in_scan => at += 1,
            // bytes between segments: leave the judgement to the decoder
            _ => return true,
        }
    }
    false
}

fn to_rgb(picture: &DynamicImage, transparency: Transparency) -> RgbImage {
    let high = |v: u16| (v >> 8) as u8;
    let flatten = |[r, g, b, a]: [u8; 4]| {
        let over_white = |c: u8| {
            let (c, a) = (u32::from(c), u32::from(a));
            ((c * a + 255 * (255 - a) + 127) / 255) as u8
        };
        match transparency {
            Transparency::Dropped => image::Rgb([r, g, b]),
            Transparency::OverWhite => image::Rgb([r, g, b].map(over_white)),
        }
    };
    let (width, height) = (picture.width(), picture.height());
    match picture {
        DynamicImage::ImageRgb8(p) => p.clone(),
        DynamicImage::ImageLuma16(p) => RgbImage::from_fn(width, height, |x, y| {
            let [grey] = p.get_pixel(x, y).0;
            image::Rgb([grey.min(255) as u8; 3])
        }),
        DynamicImage::ImageLumaA16(p) => RgbImage::from_fn(width, height, |x, y| {
            let [grey, alpha] = p.get_pixel(x, y).0.map(high);
            flatten([grey, grey, grey, alpha])
        }),
        DynamicImage::ImageRgb16(p) => {
            RgbImage::from_fn(width, height, |x, y| image::Rgb(p.get_pixel(x, y).0.map(high)))
        }
        DynamicImage::ImageRgba16(p) => RgbImage::from_fn(width, height, |x, y| flatten(p.get_pixel(x, y).0.map(high))),
        DynamicImage::ImageRgba8(p) => RgbImage::from_fn(width, height, |x, y| flatten(p.get_pixel(x, y).0)),
        DynamicImage::ImageLumaA8(p) => RgbImage::from_fn(width, height, |x, y| {
            let [grey, alpha] = p.get_pixel(x, y).0;
            flatten([grey, grey, grey, alpha])
        }),
        // 8-bit grey; the formats we read give no other kind
        other => other.to_rgb8(),
    }
}

#[cfg(test)]
mod tests {
    use image::{ExtendedColorType, ImageBuffer, ImageEncoder, Luma, LumaA, Rgb, Rgba};

    use super::*;

    fn encoded(picture: &DynamicImage, format: image::ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        picture.write_to(&mut bytes, format).expect("in memory");
        bytes.into_inner()
    }

    fn png(picture: impl Into<DynamicImage>) -> Vec<u8> {
        encoded(&picture.into(), image::ImageFormat::Png)
    }

    fn decode(bytes: &[u8], transparency: Transparency) -> Result<RgbImage, ImageError> {
        decode_rgb(bytes, Path::new("holiday.png"), transparency)
    }

    fn pixels(bytes: &[u8], transparency: Transparency) -> Vec<u8> {
        decode(bytes, transparency).expect("a picture").into_raw()
    }

    #[test]
    fn every_kind_of_pixel_becomes_what_pillow_makes_of_it() {
        use Transparency::{Dropped, OverWhite};
        let grey = ImageBuffer::from_pixel(1, 1, Luma([7_u8]));
        assert_eq!(pixels(&png(grey), Dropped), [7, 7, 7]);
        let grey_alpha = png(ImageBuffer::from_pixel(1, 1, LumaA([7_u8, 128])));
        assert_eq!(pixels(&grey_alpha, Dropped), [7, 7, 7]);
        assert_eq!(pixels(&grey_alpha, OverWhite), [131, 131, 131]);
        let rgba = png(ImageBuffer::from_pixel(1, 1, Rgba([10_u8, 20, 200, 0])));
        assert_eq!(pixels(&rgba, Dropped), [10, 20, 200]);
        assert_eq!(pixels(&rgba, OverWhite), [255, 255, 255]);
        // Pillow 13.0.0: high byte of 16-bit colour, but 16-bit grey clipped
        let values = [0_u16, 255, 256, 511, 512, 32767, 65279, 65535];
        let colour = png(ImageBuffer::from_fn(8, 1, |x, _| Rgb([values[x as usize]; 3])));
        let red: Vec<u8> = pixels(&colour, Dropped).chunks(3).map(|p| p[0]).collect();
        assert_eq!(red, [0, 0, 1, 1, 2, 127, 254, 255]);
        let grey = png(ImageBuffer::from_fn(8, 1, |x, _| Luma([values[x as usize]])));
        let red: Vec<u8> = pixels(&grey, Dropped).chunks(3).map(|p| p[0]).collect();
        assert_eq!(red, [0, 255, 255, 255, 255, 255, 255, 255]);
        let deep = png(ImageBuffer::from_pixel(1, 1, Rgba([0x1234_u16, 0x5678, 0x9abc, 0x8000])));
        assert_eq!(pixels(&deep, Dropped), [0x12, 0x56, 0x9a]);
        let deep = png(ImageBuffer::from_pixel(1, 1, LumaA([0x1234_u16, 0])));
        assert_eq!(pixels(&deep, OverWhite), [255, 255, 255]);
    }

    #[test]
    fn laying_over_white_is_pillows_for_every_value_and_alpha() {
        // FNV-1a of Pillow 13.0.0's alpha_composite of all 256 x 256 pairs over white
        let picture = ImageBuffer::from_fn(256, 256, |alpha, value| LumaA([value as u8, alpha as u8]));
        let out = to_rgb(&picture.into(), Transparency::OverWhite);
        let hash =
            out.pixels().fold(0xcbf2_9ce4_8422_2325_u64, |h, p| (h ^ u64::from(p.0[0])).wrapping_mul(0x0100_0000_01b3));
        assert_eq!(hash, 0xb134_228c_6f37_913f);
    }

    #[test]
    fn gif_webp_and_jpeg_are_read() {
        let picture: DynamicImage = RgbImage::from_pixel(9, 5, Rgb([200, 100, 0])).into();
        let exact = picture.to_rgb8().into_raw();
        assert_eq!(pixels(&encoded(&picture, image::ImageFormat::WebP), Transparency::Dropped), exact);
        let gif = encoded(&picture.to_rgba8().into(), image::ImageFormat::Gif);
        assert_eq!(decode(&gif, Transparency::Dropped).expect("a picture").dimensions(), (9, 5));
        let jpeg = pixels(&encoded(&picture, image::ImageFormat::Jpeg), Transparency::Dropped);
        assert!(jpeg.iter().zip(&exact).all(|(a, b)| a.abs_diff(*b) <= 3), "{jpeg:?}");
    }

    #[test]
    fn exif_orientation_is_applied() {
        // little-endian TIFF header, one entry: orientation (0x0112), SHORT, 6 = turn clockwise
        let exif =
            [b"II*\0\x08\0\0\0\x01\0".as_slice(), &[0x12, 0x01, 0x03, 0, 0x01, 0, 0, 0, 0x06, 0, 0, 0], &[0, 0, 0, 0]]
                .concat();
        let mut bytes = Vec::new();
        let mut encoder = image::codecs::png::PngEncoder::new(&mut bytes);
        encoder.set_exif_metadata(exif).expect("supported");
        encoder.write_image(&[1, 1, 1, 2, 2, 2], 2, 1, ExtendedColorType::Rgb8).expect("in memory");
        let upright = decode(&bytes, Transparency::Dropped).expect("a picture");
        assert_eq!(upright.dimensions(), (1, 2));
        assert_eq!(upright.into_raw(), [1, 1, 1, 2, 2, 2]);
    }

    #[test]
    fn bad_files_are_named() {
        let noisy: DynamicImage =
            RgbImage::from_fn(64, 64, |x, y| Rgb([(x * 37 + y * 91) as u8, (x * y) as u8, (x ^ y) as u8])).into();
        for format in
            [image::ImageFormat::Png, image::ImageFormat::Jpeg, image::ImageFormat::WebP, image::ImageFormat::Gif]
        {
            let whole = encoded(&noisy.to_rgb8().into(), format);
            for keep in [whole.len() / 2, whole.len() * 9 / 10, 20] {
                let error = decode(&whole[..keep], Transparency::Dropped).expect_err("truncated").to_string();
                assert!(error.starts_with("holiday.png: "), "{format:?} {keep}: {error}");
            }
        }
        let text = decode(b"# Not a picture, but words", Transparency::Dropped).expect_err("text").to_string();
        assert!(text.contains("JPEG, PNG, WebP, GIF"), "{text}");
        let missing = load_rgb(Path::new("no/such.png"), Transparency::Dropped).expect_err("missing");
        let missing = SessionError::from(missing).to_string();
        assert!(missing.starts_with("no/such.png: ") && missing.matches("such.png").count() == 1, "{missing}");
    }

    #[test]
    fn huge_and_empty_pictures_are_refused_before_they_are_decoded() {
        let gif = |width: u16, height: u16| {
            let mut bytes = encoded(&image::RgbaImage::new(1, 1).into(), image::ImageFormat::Gif);
            bytes[6..8].copy_from_slice(&width.to_le_bytes());
            bytes[8..10].copy_from_slice(&height.to_le_bytes());
            bytes
        };
        let error = decode(&gif(60_000, 60_000), Transparency::Dropped).expect_err("huge").to_string();
        assert!(error.contains("60000 x 60000") && error.contains("89478485"), "{error}");
        let error = decode(&gif(0, 5), Transparency::Dropped).expect_err("empty").to_string();
        assert!(error.contains("5 x 0"), "{error}");
    }
}
