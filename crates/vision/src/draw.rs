//! Answers drawn on pictures: boxes, areas, points and the words beside them.

use std::fs::OpenOptions;
use std::path::Path;

use font8x8::{BASIC_FONTS, GREEK_FONTS, LATIN_FONTS, UnicodeFonts};
use image::{ImageFormat, Rgb, RgbImage};
use roofbench_core::session::SessionError;

/// Colours that are told apart, also by the colour-blind (Okabe and Ito).
const COLOURS: [[u8; 3]; 7] =
    [[230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [0, 114, 178], [213, 94, 0], [204, 121, 167]];
/// Height and width of a letter of the font.
const LETTER: i64 = 8;

/// Left, top, right and bottom, in pixels.
pub(crate) type Corners = [f32; 4];

/// The colour of the thing with this number.
pub(crate) fn colour(number: usize) -> Rgb<u8> {
    Rgb(COLOURS[number % COLOURS.len()])
}

/// How many pixels of the picture a pixel of a letter takes, and how thick lines are.
fn scale(picture: &RgbImage) -> i64 {
    /// So many lines of text would fill the shorter side.
    const LINES: u32 = 30;
    i64::from((picture.width().min(picture.height()) / (LINES * LETTER as u32)).max(1))
}

/// Fills what lies within the picture of a rectangle, right and bottom exclusive.
fn fill(picture: &mut RgbImage, [left, top, right, bottom]: [i64; 4], colour: Rgb<u8>) {
    let within = |at: i64, side: u32| at.clamp(0, i64::from(side)) as u32;
    let (width, height) = picture.dimensions();
    for y in within(top, height)..within(bottom, height) {
        for x in within(left, width)..within(right, width) {
            picture.put_pixel(x, y, colour);
        }
    }
}

/// The sides of a box.
pub(crate) fn outline(picture: &mut RgbImage, corners: Corners, colour: Rgb<u8>) {
    let thickness = scale(picture) + 1;
    let [left, top, right, bottom] = corners.map(|side| side.round() as i64);
    fill(picture, [left, top, right, top.saturating_add(thickness)], colour);
    fill(picture, [left, bottom.saturating_sub(thickness), right, bottom], colour);
    fill(picture, [left, top, left.saturating_add(thickness), bottom], colour);
    fill(picture, [right.saturating_sub(thickness), top, right, bottom], colour);
}

/// A point, as a square with a white rim.
pub(crate) fn point(picture: &mut RgbImage, [x, y]: [f32; 2], colour: Rgb<u8>) {
    let half = 2 * scale(picture) + 1;
    let (x, y) = (x.round() as i64, y.round() as i64);
    for (half, colour) in [(half + scale(picture), Rgb([255; 3])), (half, colour)] {
        let (from, to) = ([x, y].map(|at| at.saturating_sub(half)), [x, y].map(|at| at.saturating_add(half + 1)));
        fill(picture, [from[0], from[1], to[0], to[1]], colour);
    }
}

/// Mixes `colour` into the pixels that `is_inside` says by their number, row by row.
pub(crate) fn tint(picture: &mut RgbImage, is_inside: impl Fn(usize) -> bool, colour: Rgb<u8>) {
    for (number, pixel) in picture.pixels_mut().enumerate() {
        if is_inside(number) {
            for (level, of_colour) in pixel.0.iter_mut().zip(colour.0) {
                *level = (u16::from(*level) + u16::from(of_colour)).div_ceil(2) as u8;
            }
        }
    }
}

/// `text` on a plate of `colour` whose lower left corner is at `place` where there is room; letters that the font lacks
/// are question marks.
pub(crate) fn words(picture: &mut RgbImage, [x, y]: [f32; 2], text: &str, colour: Rgb<u8>) {
    let scale = scale(picture);
    let letters: Vec<char> = text.chars().collect();
    let (width, height) = ((LETTER * letters.len() as i64 + 2) * scale, (LETTER + 2) * scale);
    let room = |at: i64, plate: i64, side: u32| at.min(i64::from(side) - plate).max(0);
    let left = room(x.round() as i64, width, picture.width());
    let top = room((y.round() as i64).saturating_sub(height), height, picture.height());
    fill(picture, [left, top, left + width, top + height], colour);
    let [red, green, blue] = colour.0.map(u32::from);
    let ink = if 2 * red + 5 * green + blue > 8 * 110 { Rgb([0; 3]) } else { Rgb([255; 3]) };
    let glyph = |letter: char| {
        let known = BASIC_FONTS.get(letter).or_else(|| LATIN_FONTS.get(letter)).or_else(|| GREEK_FONTS.get(letter));
        known.or_else(|| BASIC_FONTS.get('?')).unwrap_or_default()
    };
    for (number, &letter) in letters.iter().enumerate() {
        for (row, bits) in glyph(letter).into_iter().enumerate() {
            for column in (0..LETTER).filter(|column| bits >> column & 1 == 1) {
                let x = left + (1 + LETTER * number as i64 + column) * scale;
                let y = top + (1 + row as i64) * scale;
                fill(picture, [x, y, x + scale, y + scale], ink);
            }
        }
    }
}

/// Refuses a file that a picture can't be written to: better before a model has run than after.
///
/// # Errors
/// Names the file, and the endings that are known or why it can't be written.
pub(crate) fn check(path: &Path) -> Result<(), SessionError> {
    if !matches!(ImageFormat::from_path(path), Ok(ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP)) {
        return Err(unwritten(path, "its name must end in .png, .jpg, .jpeg or .webp"));
    }
    let is_new = !path.exists();
    OpenOptions::new().create(true).append(true).open(path).map_err(|error| unwritten(path, error))?;
    if is_new {
        std::fs::remove_file(path).map_err(|error| unwritten(path, error))?;
    }
    Ok(())
}

/// Writes `picture`, in the format that the name ends in.
///
/// # Errors
/// Names the file.
pub(crate) fn save(picture: &RgbImage, path: &Path) -> Result<(), SessionError> {
    picture.save(path).map_err(|error| unwritten(path, error))
}

fn unwritten(path: &Path, reason: impl std::fmt::Display) -> SessionError {
    SessionError::File { path: path.to_owned(), reason: format!("can't be written (--save): {reason}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RED: Rgb<u8> = Rgb([255, 0, 0]);

    fn white() -> RgbImage {
        RgbImage::from_pixel(40, 20, Rgb([255; 3]))
    }

    /// Left, top, right and bottom of the pixels that are not white.
    fn changed(picture: &RgbImage) -> Option<[u32; 4]> {
        let changed = picture.enumerate_pixels().filter(|(_, _, pixel)| **pixel != Rgb([255; 3]));
        changed.fold(None, |area: Option<[u32; 4]>, (x, y, _)| {
            let [left, top, right, bottom] = area.unwrap_or([x, y, x, y]);
            Some([left.min(x), top.min(y), right.max(x), bottom.max(y)])
        })
    }

    #[test]
    fn boxes_are_drawn_inside_their_corners() {
        let mut picture = white();
        outline(&mut picture, [3.0, 4.0, 20.0, 15.0], RED);
        assert_eq!(changed(&picture), Some([3, 4, 19, 14]));
        assert_eq!(*picture.get_pixel(10, 10), Rgb([255; 3]));
        // beyond the picture, inside out, and no numbers at all
        let mut picture = white();
        outline(&mut picture, [-1e30, -9.0, 1e30, 9.0], RED);
        assert_eq!(changed(&picture), Some([0, 7, 39, 8]));
        for corners in [[f32::NAN; 4], [9.0, 9.0, 2.0, 2.0], [50.0, 50.0, 60.0, 60.0]] {
            outline(&mut picture.clone(), corners, RED);
        }
    }

    #[test]
    fn words_stay_in_the_picture() {
        for place in [[0.0, 0.0], [39.0, 19.0], [-1e30, 1e30]] {
            let mut picture = white();
            words(&mut picture, place, "ox", RED);
            let area = changed(&picture).expect("a plate");
            assert_eq!((area[2] - area[0], area[3] - area[1]), (17, 9), "{place:?}");
            assert!(picture.pixels().any(|pixel| *pixel == Rgb([255; 3])) && area[2] < 40 && area[3] < 20);
        }
        let mut picture = white();
        words(&mut picture, [0.0, 0.0], &"Größe 猫 ".repeat(9), RED);
        assert_eq!(changed(&picture), Some([0, 0, 39, 9]));
    }

    #[test]
    fn letters_are_not_mirrored() {
        let mut picture = white();
        words(&mut picture, [0.0, 10.0], "L", Rgb([0; 3]));
        let ink = |x: u32, y: u32| *picture.get_pixel(x, y) == Rgb([255; 3]);
        let columns: Vec<usize> = (1..9).map(|x| (1..9).filter(|y| ink(x, *y)).count()).collect();
        let (left, right) = columns.split_at(4);
        assert!(left.iter().sum::<usize>() > right.iter().sum::<usize>(), "the stem is on the left: {columns:?}");
    }

    #[test]
    fn areas_are_mixed() {
        let mut picture = white();
        tint(&mut picture, |number| number == 41, Rgb([0, 100, 255]));
        assert_eq!(*picture.get_pixel(1, 1), Rgb([128, 178, 255]));
        assert_eq!(changed(&picture), Some([1, 1, 1, 1]));
        point(&mut picture, [20.0, 10.0], RED);
        assert_eq!((picture.get_pixel(20, 10), picture.get_pixel(24, 10)), (&RED, &Rgb([255; 3])));
    }

    #[test]
    fn files_that_can_not_be_written_are_named() {
        let message = |path: &str| check(Path::new(path)).expect_err("refused").to_string();
        assert_eq!(
            message("no/such/out.png").split(": ").take(2).collect::<Vec<_>>(),
            ["no/such/out.png", "can't be written (--save)"]
        );
        assert!(message("out.bmp").contains(".png, .jpg"), "{}", message("out.bmp"));
        assert!(message("out").contains(".png, .jpg"));
    }
}
