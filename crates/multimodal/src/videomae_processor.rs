//! From the frames of a video to `pixel_values`, as `transformers.VideoMAEImageProcessor` makes them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use roofbench_core::session::{Arguments, Processor, SessionError, Tensors};
use roofbench_vision::preprocess::ImageProcessor;
use serde_json::Value;

/// Prepares the pictures of a call as the frames of one video.
#[derive(Debug, Clone)]
pub struct VideoMaeProcessor(ImageProcessor);

impl VideoMaeProcessor {
    /// Reads `preprocessor_config.json`.
    ///
    /// # Errors
    /// Names the field that is malformed or not supported.
    pub fn from_config(config: &Value) -> Result<Self, SessionError> {
        ImageProcessor::from_config(config, "videomae").map(Self)
    }
}

impl Processor for VideoMaeProcessor {
    /// `pixel_values` (1, frames, 3, height, width) of the files of `images`.
    fn call(
        &self,
        method: &str,
        files: &BTreeMap<String, Vec<PathBuf>>,
        inputs: &Tensors,
        arguments: &Arguments,
    ) -> Result<Tensors, SessionError> {
        let frames = self.0.call(method, files, inputs, arguments)?;
        frames.into_iter().map(|(name, frames)| Ok((name, frames.unsqueeze(0)?))).collect()
    }
}
