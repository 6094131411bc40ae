//! What the sessions of all text families share: arguments read by name and checked before a model sees them.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use roofbench_core::session::{Call, ModelSpec, SessionError};
use roofbench_nn::kernels::isa::Isa;

/// Candle's result, unless another error is named.
pub(crate) type Result<T, E = candle_core::Error> = std::result::Result<T, E>;

/// The inputs of a call, each known to the class that reads them.
pub(crate) struct Inputs<'a> {
    call: &'a Call,
}

impl<'a> Inputs<'a> {
    /// Takes `forward` with any of the tensors in `known` and no plain argument.
    ///
    /// What the class would heed and we don't (`inputs_embeds`, `output_attentions`) is refused, not ignored.
    pub(crate) fn forward(call: &'a Call, known: &[&str]) -> Result<Self, SessionError> {
        if call.method != "forward" {
            return Err(refuse("method", format!("`{}` is not supported; supported: forward", call.method)));
        }
        if let Some(name) = call.inputs.keys().find(|name| !known.contains(&name.as_str())) {
            return Err(refuse(name, format!("not an input of this class here; supported: {}", known.join(", "))));
        }
        if let Some(name) = call.arguments.keys().next() {
            return Err(refuse(name, "plain arguments of `forward` are not supported"));
        }
        Ok(Self { call })
    }

    /// Integers (batch, seq) as i64, neither dimension empty.
    pub(crate) fn matrix(&self, name: &str) -> Result<Tensor, SessionError> {
        let tensor = self.call.inputs.get(name).ok_or_else(|| refuse(name, "is missing"))?;
        match tensor.dims() {
            [batch, seq] if *batch > 0 && *seq > 0 => integers(name, tensor),
            shape => Err(refuse(name, format!("has shape {shape:?}, expected (batch, seq), neither of them 0"))),
        }
    }

    /// Integers of the shape of `like` as i64, or `None` when the call leaves them out.
    pub(crate) fn matrix_like(&self, name: &str, like: &Tensor) -> Result<Option<Tensor>, SessionError> {
        match self.call.inputs.get(name) {
            None => Ok(None),
            Some(tensor) if tensor.dims() == like.dims() => integers(name, tensor).map(Some),
            Some(tensor) => {
                Err(refuse(name, format!("has shape {:?}, input_ids have {:?}", tensor.dims(), like.dims())))
            }
        }
    }
}

/// Checks that each of `ids` (i64) is in [0, `limit`), where `limit` is `field` of config.json.
pub(crate) fn in_range(name: &str, ids: &Tensor, field: &str, limit: usize) -> Result<(), SessionError> {
    let ids = ids.flatten_all()?.to_vec1::<i64>()?;
    match ids.iter().position(|&id| usize::try_from(id).map_or(true, |id| id >= limit)) {
        None => Ok(()),
        Some(at) => Err(refuse(name, format!("element {at} is {}, beyond {field} = {limit}", ids[at]))),
    }
}

/// Checks a mask (i64).
pub(crate) fn zero_or_one(name: &str, mask: &Tensor) -> Result<(), SessionError> {
    let mask = mask.flatten_all()?.to_vec1::<i64>()?;
    match mask.iter().position(|value| !matches!(value, 0 | 1)) {
        None => Ok(()),
        Some(at) => Err(refuse(name, format!("element {at} is {}, neither 0 nor 1", mask[at]))),
    }
}

/// Which path a model of the shared blocks takes on the device and in the type of `spec`.
pub(crate) fn paths(spec: &ModelSpec) -> BTreeMap<String, String> {
    let fused = spec.device.is_cpu() && matches!(spec.dtype, DType::F32 | DType::BF16 | DType::F16);
    let path = if fused { Isa::current().to_string() } else { "candle".to_string() };
    ["matmul", "attention", "norm"].map(|kind| (kind.to_string(), path.clone())).into()
}

/// A [`SessionError::Input`].
pub(crate) fn refuse(name: &str, reason: impl Into<String>) -> SessionError {
    SessionError::Input { name: name.to_string(), reason: reason.into() }
}

fn integers(name: &str, tensor: &Tensor) -> Result<Tensor, SessionError> {
    if !tensor.dtype().is_int() {
        return Err(refuse(name, format!("has type {:?}, expected integers", tensor.dtype())));
    }
    Ok(tensor.to_dtype(DType::I64)?)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    fn call(name: &str, tensor: Tensor) -> Call {
        Call { method: "forward".into(), inputs: [(name.to_string(), tensor)].into(), arguments: Default::default() }
    }

    fn message<T>(result: Result<T, SessionError>) -> String {
        result.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn what_the_class_does_not_take_is_refused_by_name() {
        let ids = Tensor::zeros((1, 2), DType::I64, &Device::Cpu).unwrap();
        let mut call = call("inputs_embeds", ids);
        let error = message(Inputs::forward(&call, &["input_ids"]));
        assert_eq!(error, "input `inputs_embeds`: not an input of this class here; supported: input_ids");
        call.inputs.clear();
        assert_eq!(
            message(Inputs::forward(&call, &[]).and_then(|inputs| inputs.matrix("input_ids"))),
            "input `input_ids`: is missing"
        );
        call.arguments.insert("output_attentions".into(), true.into());
        assert!(message(Inputs::forward(&call, &[])).starts_with("input `output_attentions`: "));
        call.method = "generate".into();
        assert!(message(Inputs::forward(&call, &[])).starts_with("input `method`: `generate`"));
    }

    #[test]
    fn shapes_and_types_are_checked() {
        let cpu = &Device::Cpu;
        let read = |tensor: Tensor| Inputs::forward(&call("x", tensor), &["x"]).and_then(|inputs| inputs.matrix("x"));
        assert_eq!(read(Tensor::new(&[[1u32, 2]], cpu).unwrap()).unwrap().dtype(), DType::I64);
        assert!(message(read(Tensor::new(&[1u32, 2], cpu).unwrap())).contains("has shape [2], expected (batch, seq)"));
        assert!(message(read(Tensor::zeros((0, 3), DType::I64, cpu).unwrap())).contains("has shape [0, 3]"));
        assert!(message(read(Tensor::new(&[[1f32]], cpu).unwrap())).contains("has type F32, expected integers"));

        let like = Tensor::zeros((1, 3), DType::I64, cpu).unwrap();
        let call = call("mask", Tensor::ones((1, 2), DType::I64, cpu).unwrap());
        let inputs = Inputs::forward(&call, &["mask"]).unwrap();
        assert!(message(inputs.matrix_like("mask", &like)).contains("[1, 2], input_ids have [1, 3]"));
        assert!(inputs.matrix_like("other", &like).unwrap().is_none());
    }

    #[test]
    fn the_first_id_out_of_range_is_named() {
        let check = |ids: [i64; 3]| in_range("input_ids", &Tensor::new(&[ids], &Device::Cpu)?, "vocab_size", 5);
        assert!(check([0, 4, 2]).is_ok());
        assert_eq!(message(check([0, 5, 9])), "input `input_ids`: element 1 is 5, beyond vocab_size = 5");
        assert_eq!(message(check([0, 1, -1])), "input `input_ids`: element 2 is -1, beyond vocab_size = 5");
    }
}
