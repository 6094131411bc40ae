//! What people do with a vision model: labels of pictures.

use std::collections::BTreeMap;

use candle_core::Device;
use roofbench_core::classify;
use roofbench_core::session::{Arguments, Call, ModelSpec, Processor, Session, SessionError, Tensors};
use roofbench_core::task::{Answer, RawInputs, Task};
use serde_json::Value;

/// A vision model's task: what its class gives decides the answer.
struct VisionTask {
    raw: RawInputs,
    processor: Box<dyn Processor>,
    device: Device,
    config: Value,
}

/// The task of `spec` for pictures: labels (a classifier).
///
/// # Errors
/// Other inputs than pictures, or what [`processor`](crate::processor) refuses.
pub fn task(spec: &ModelSpec, raw: RawInputs) -> Result<Box<dyn Task>, SessionError> {
    raw.expect(&spec.family, &["image"])?;
    Ok(Box::new(VisionTask {
        raw,
        processor: crate::processor(&spec.family, &spec.extra_configs)?,
        device: spec.device.clone(),
        config: spec.config.clone(),
    }))
}

impl Task for VisionTask {
    fn preparation(&self) -> &'static str {
        "preprocessing"
    }

    fn call(&self) -> Result<Call, SessionError> {
        let files = BTreeMap::from([("images".to_owned(), self.raw.images.clone())]);
        let tensors = self.processor.call("preprocess", &files, &Tensors::new(), &Arguments::new())?;
        let inputs = tensors.into_iter().map(|(name, tensor)| Ok((name, tensor.to_device(&self.device)?)));
        let inputs = inputs.collect::<candle_core::Result<_>>()?;
        Ok(Call { method: "forward".to_owned(), inputs, arguments: self.raw.arguments.clone() })
    }

    fn answer(&self, _: &Call, outputs: &Tensors, _: &mut dyn Session) -> Result<Vec<Answer>, SessionError> {
        /// Labels shown for each picture.
        const TOP: usize = 5;
        let names: Vec<String> = self.raw.images.iter().map(|path| path.display().to_string()).collect();
        match outputs.get("logits").filter(|logits| logits.rank() == 2) {
            Some(logits) => Ok(vec![classify::table(&names, logits, &self.config, TOP)?]),
            None => Ok(Vec::new()),
        }
    }
}
