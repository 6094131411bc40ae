//! Pictures for FLAVA: `pixel_values`, and `codebook_pixel_values` for the codebook that names its patches.
//! Mirrors `transformers.FlavaImageProcessorPil`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use roofbench_core::session::{Arguments, Processor, SessionError, Tensors};
use roofbench_vision::preprocess::ImageProcessor;
use serde_json::{Map, Value, json};

/// How far the codebook's pixels keep away from 0 and 1 (arXiv:2102.12092, appendix A.3).
const LAPLACE_EPS: f64 = 0.1;

/// Prepares pictures as a checkpoint's `preprocessor_config.json` says.
///
/// ```
/// use roofbench_multimodal::flava_processor::FlavaProcessor;
/// use roofbench_multimodal::serde_json::json;
///
/// FlavaProcessor::from_config(&json!({"size": 224, "crop_size": 224, "codebook_size": 112}))?;
/// let error = FlavaProcessor::from_config(&json!({"codebook_size": "large"})).err().map(|error| error.to_string());
/// assert!(error.unwrap_or_default().starts_with("preprocessor_config.json: `codebook_size`"));
/// # Ok::<(), roofbench_multimodal::SessionError>(())
/// ```
#[derive(Debug, Clone)]
pub struct FlavaProcessor {
    images: ImageProcessor,
    codebook: ImageProcessor,
    /// The codebook's pixels are drawn together towards the middle.
    maps_pixels: bool,
    returns_codebook: bool,
}

impl FlavaProcessor {
    /// Reads `preprocessor_config.json`.
    ///
    /// # Errors
    /// [`SessionError::Preprocessor`] names the field that is malformed or not supported.
    pub fn from_config(config: &Value) -> Result<Self, SessionError> {
        let flag = |field: &str, default: bool| match config.get(field) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::Bool(value)) => Ok(*value),
            Some(other) => Err(refusal(field, format!("is {other}, expected true or false"))),
        };
        if flag("return_image_mask", false)? {
            return Err(refusal("return_image_mask", "true is not supported: such masks are drawn at random"));
        }
        // the same steps with defaults of their own
        let mut codebook: Map<String, Value> = [
            ("size", json!(112)),
            ("crop_size", json!(112)),
            ("resample", json!(1)),
            ("image_mean", json!([0.0, 0.0, 0.0])),
            ("image_std", json!([1.0, 1.0, 1.0])),
        ]
        .map(|(field, value)| (field.to_owned(), value))
        .into_iter()
        .collect();
        for (field, value) in config.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
            match field.strip_prefix("codebook_") {
                Some(field) => drop(codebook.insert(field.to_owned(), value.clone())),
                None if field == "do_convert_rgb" => drop(codebook.insert(field.clone(), value.clone())),
                None => {}
            }
        }
        let codebook = ImageProcessor::from_config(&codebook.into(), "flava").map_err(|error| match error {
            SessionError::Preprocessor { field, reason } => refusal(&format!("codebook_{field}"), reason),
            other => other,
        })?;
        Ok(Self {
            images: ImageProcessor::from_config(config, "flava")?,
            codebook,
            maps_pixels: flag("codebook_do_map_pixels", true)?,
            returns_codebook: flag("return_codebook_pixels", false)?,
        })
    }
}

fn refusal(field: &str, reason: impl Into<String>) -> SessionError {
    SessionError::Preprocessor { field: field.to_owned(), reason: reason.into() }
}

impl Processor for FlavaProcessor {
    fn call(
        &self,
        method: &str,
        files: &BTreeMap<String, Vec<PathBuf>>,
        inputs: &Tensors,
        arguments: &Arguments,
    ) -> Result<Tensors, SessionError> {
        let mut rest = arguments.clone();
        let returns_codebook = match rest.remove("return_codebook_pixels") {
            None | Some(Value::Null) => self.returns_codebook,
            Some(Value::Bool(value)) => value,
            Some(other) => {
                let reason = format!("is {other}, expected true or false");
                return Err(SessionError::input("return_codebook_pixels", reason));
            }
        };
        let mut outputs = self.images.call(method, files, inputs, &rest)?;
        if returns_codebook {
            for (name, mut values) in self.codebook.call(method, files, inputs, &rest)? {
                if self.maps_pixels {
                    values = values.affine(1.0 - 2.0 * LAPLACE_EPS, LAPLACE_EPS)?;
                }
                outputs.insert(format!("codebook_{name}"), values);
            }
        }
        Ok(outputs)
    }
}
