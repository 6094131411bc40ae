//! Pictures laid into a page: turned, scaled until they fit, and put into the middle. Mirrors
//! `transformers.DonutImageProcessor`.

use image::RgbImage;
use image::imageops::{replace, rotate90};
use roofbench_core::session::SessionError;

use super::{Config, Kind, MAX_PIXELS, Size, SizeField, filter, refuse};
use crate::resize::{Filter, resize};

/// How a picture gets its page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Page {
    /// Height and width.
    size: [u32; 2],
    /// A picture that lies where the page stands, or stands where it lies, is turned clockwise.
    turns: bool,
    /// Its shorter side becomes the page's.
    scales: bool,
    /// What is larger than the page is made smaller.
    shrinks: bool,
    /// What is smaller is put into the middle of black.
    pads: bool,
    filter: Filter,
}

impl Page {
    pub(super) fn read(config: &Config, kind: &Kind) -> Result<Self, SessionError> {
        let size = match &config.size {
            None => kind.size,
            // older files write width and height
            Some(SizeField::Pair([width, height])) => {
                SizeField::Pair([*height, *width]).read("size", |side| Size::Exact([side, side]))?
            }
            Some(size) => size.read("size", |side| Size::Exact([side, side]))?,
        };
        let Size::Exact(size) = size else { return refuse("size", "needs height and width for Donut") };
        if config.do_center_crop == Some(true) {
            return refuse("do_center_crop", "true is not supported for Donut");
        }
        Ok(Self {
            size,
            turns: config.do_align_long_axis.unwrap_or(false),
            scales: config.do_resize.unwrap_or(true),
            shrinks: config.do_thumbnail.unwrap_or(true),
            pads: config.do_pad.unwrap_or(true),
            filter: filter(config, kind)?,
        })
    }

    /// The page of a picture that is not empty.
    pub(super) fn lay_out(&self, picture: &RgbImage) -> Result<RgbImage, SessionError> {
        let [height, width] = self.size;
        let lies = |height, width| width > height;
        let stands = |height, width| width < height;
        let (across, down) = picture.dimensions();
        let turns = (stands(height, width) && lies(down, across)) || (lies(height, width) && stands(down, across));
        let turned = if self.turns && turns { rotate90(picture) } else { picture.clone() };
        let scaled = match self.scales {
            true => {
                let shorter = Size::ShortestEdge(height.min(width));
                resized(&turned, shorter.for_picture(turned.height(), turned.width()), self.filter)?
            }
            false => turned,
        };
        let fitted = if self.shrinks { self.shrunk(scaled)? } else { scaled };
        if !self.pads {
            return Ok(fitted);
        }
        let (Some(beside), Some(below)) = (width.checked_sub(fitted.width()), height.checked_sub(fitted.height()))
        else {
            let reason = format!(
                "{} x {} pixels are larger than the page of {height} x {width}, and do_thumbnail is false",
                fitted.height(),
                fitted.width()
            );
            return Err(SessionError::input("images", reason));
        };
        let mut page = RgbImage::new(width, height);
        replace(&mut page, &fitted, i64::from(beside / 2), i64::from(below / 2));
        Ok(page)
    }

    /// Not larger than the page, in the same proportions.
    fn shrunk(&self, picture: RgbImage) -> Result<RgbImage, SessionError> {
        let (across, down) = picture.dimensions();
        let (mut height, mut width) = (down.min(self.size[0]), across.min(self.size[1]));
        if [height, width] == [down, across] {
            return Ok(picture);
        }
        let part = |side: u32, new: u32, old: u32| (u64::from(side) * u64::from(new) / u64::from(old)) as u32;
        if down > across {
            width = part(across, height, down);
        } else if across > down {
            height = part(down, width, across);
        }
        // the library takes Pillow's number 0, for the nearest, for none
        let filter = if self.filter == Filter::Nearest { Filter::Bicubic } else { self.filter };
        resized(&picture, [height.into(), width.into()], filter)
    }
}

fn resized(picture: &RgbImage, [height, width]: [u64; 2], filter: Filter) -> Result<RgbImage, SessionError> {
    if height == 0 || width == 0 || height.saturating_mul(width) > MAX_PIXELS {
        let (across, down) = picture.dimensions();
        let reason = format!(
            "{down} x {across} pixels would be resized to {height} x {width}; it must be 1 to {MAX_PIXELS} pixels"
        );
        return Err(SessionError::input("images", reason));
    }
    // both are at most MAX_PIXELS
    Ok(resize(picture, height as u32, width as u32, filter))
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    fn page(size: [u32; 2]) -> Page {
        Page { size, turns: true, scales: true, shrinks: true, pads: true, filter: Filter::Bilinear }
    }

    /// Red in the left half, green in the right one.
    fn picture(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, _| if x < width / 2 { Rgb([255, 0, 0]) } else { Rgb([0, 255, 0]) })
    }

    #[test]
    fn what_lies_is_turned_to_stand_in_the_middle() -> Result<(), SessionError> {
        // 40 x 10 turned is 10 x 40; scaled to 8 x 32, then to 6 x 24 of a page of 8 x 24
        let page = page([24, 8]).lay_out(&picture(40, 10))?;
        assert_eq!(page.dimensions(), (8, 24));
        assert_eq!([0, 7].map(|x| *page.get_pixel(x, 0)), [Rgb([0; 3]); 2]);
        assert_eq!(*page.get_pixel(4, 2), Rgb([255, 0, 0]));
        assert_eq!(*page.get_pixel(4, 20), Rgb([0, 255, 0]));
        Ok(())
    }

    #[test]
    fn pictures_that_do_not_fit_are_refused() {
        let large = Page { shrinks: false, scales: false, ..page([4, 4]) };
        let message = large.lay_out(&picture(6, 2)).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(message.contains("2 x 6 pixels are larger than the page of 4 x 4"), "{message}");
        let narrow = page([8, 8]).lay_out(&picture(1, 100_000_000 / 8));
        assert!(narrow.err().is_some_and(|error| error.to_string().contains("would be resized to")));
    }

    #[test]
    fn older_files_write_the_width_first() -> Result<(), SessionError> {
        let read = |size| {
            let config = serde_json::json!({ "size": size });
            let processor = super::super::ImageProcessor::from_config(&config, "donut")?;
            Ok::<_, SessionError>(processor.prepare(&picture(3, 5))?.dims().to_vec())
        };
        assert_eq!(read(serde_json::json!([6, 9]))?, [3, 9, 6]);
        assert_eq!(read(serde_json::json!({"height": 9, "width": 6}))?, [3, 9, 6]);
        assert_eq!(read(serde_json::json!(7))?, [3, 7, 7]);
        Ok(())
    }
}
