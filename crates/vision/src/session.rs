//! What the sessions of all vision families share: arguments read by name and checked before a model sees them.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use roofbench_core::session::{Call, ModelSpec, SessionError};
use roofbench_nn::kernels::isa::Isa;
use serde_json::Value;

/// What calls of a session give; layers give candle's `Result`.
pub(crate) type SessionResult<T> = Result<T, SessionError>;

/// The inputs of a call of `forward`.
pub(crate) struct Inputs<'a> {
    call: &'a Call,
}

impl<'a> Inputs<'a> {
    /// Takes `forward` with any of the tensors `inputs` and the plain arguments `arguments`.
    ///
    /// What the class would heed and we don't (`bool_masked_pos`, `output_attentions`) is refused, not ignored.
    pub(crate) fn forward(call: &'a Call, inputs: &[&str], arguments: &[&str]) -> SessionResult<Self> {
        if call.method != "forward" {
            return Err(refuse("method", format!("`{}` is not supported; supported: forward", call.method)));
        }
        let input = call.inputs.keys().find(|name| !inputs.contains(&name.as_str()));
        let argument = call.arguments.keys().find(|name| !arguments.contains(&name.as_str()));
        if let Some(name) = input.or(argument) {
            let supported = [inputs, arguments].concat().join(", ");
            return Err(refuse(name, format!("is not supported for this class; supported: {supported}")));
        }
        Ok(Self { call })
    }

    /// `pixel_values`: floats (batch, `channels`, height, width), no dimension 0.
    pub(crate) fn pixel_values(&self, channels: usize) -> SessionResult<&'a Tensor> {
        let name = "pixel_values";
        let tensor = self.call.inputs.get(name).ok_or_else(|| refuse(name, "is missing"))?;
        match tensor.dims() {
            [batch, found, height, width] if *found == channels && batch * height * width > 0 => {}
            shape => {
                let expected = format!("(batch, channels = {channels}, height, width), none of them 0");
                return Err(refuse(name, format!("has shape {shape:?}, expected {expected}")));
            }
        }
        if !tensor.dtype().is_float() {
            return Err(refuse(name, format!("has type {:?}, expected floats", tensor.dtype())));
        }
        Ok(tensor)
    }

    /// A plain argument that is true or false; false when the call leaves it out.
    pub(crate) fn flag(&self, name: &str) -> SessionResult<bool> {
        match self.call.arguments.get(name) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            Some(other) => Err(refuse(name, format!("is {other}, expected true or false"))),
        }
    }
}

/// Which path a model of the shared blocks takes on the device and in the type of `spec`.
pub(crate) fn paths(spec: &ModelSpec) -> BTreeMap<String, String> {
    let fused = spec.device.is_cpu() && matches!(spec.dtype, DType::F32 | DType::BF16 | DType::F16);
    let path = if fused { Isa::current().to_string() } else { "candle".to_owned() };
    ["matmul", "attention", "norm"].map(|kind| (kind.to_owned(), path.clone())).into()
}

/// A [`SessionError::Input`].
pub(crate) fn refuse(name: &str, reason: impl Into<String>) -> SessionError {
    SessionError::Input { name: name.to_owned(), reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use serde_json::json;

    use super::*;

    fn pixels(shape: &[usize], dtype: DType) -> Call {
        let tensor = Tensor::zeros(shape, dtype, &Device::Cpu).expect("zeros");
        Call { method: "forward".into(), inputs: [("pixel_values".into(), tensor)].into(), ..Call::default() }
    }

    fn read(call: &Call) -> String {
        let inputs = Inputs::forward(call, &["pixel_values"], &["interpolate"]);
        match inputs.and_then(|inputs| inputs.pixel_values(3).and(inputs.flag("interpolate"))) {
            Ok(flag) => flag.to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn what_the_class_does_not_take_is_refused_by_name() {
        let mut call = pixels(&[1, 3, 2, 2], DType::F32);
        assert_eq!(read(&call), "false");
        call.arguments.insert("interpolate".into(), json!(true));
        assert_eq!(read(&call), "true");
        call.arguments.insert("interpolate".into(), json!("yes"));
        assert_eq!(read(&call), "input `interpolate`: is \"yes\", expected true or false");
        call.arguments.insert("output_attentions".into(), json!(true));
        let refused = "is not supported for this class; supported: pixel_values, interpolate";
        assert_eq!(read(&call), format!("input `output_attentions`: {refused}"));
        let pixel_values = call.inputs["pixel_values"].clone();
        call.inputs.insert("bool_masked_pos".into(), pixel_values);
        assert_eq!(read(&call), format!("input `bool_masked_pos`: {refused}"));
        call.method = "generate".into();
        assert!(read(&call).starts_with("input `method`: `generate`"));
    }

    #[test]
    fn shapes_and_types_are_checked() {
        for shape in [&[3, 2, 2][..], &[1, 4, 2, 2], &[0, 3, 2, 2], &[1, 3, 2, 0]] {
            let message = read(&pixels(shape, DType::F32));
            assert!(message.starts_with(&format!("input `pixel_values`: has shape {shape:?}, expected")), "{message}");
        }
        assert_eq!(read(&pixels(&[1, 3, 2, 2], DType::U8)), "input `pixel_values`: has type U8, expected floats");
        let call = Call { method: "forward".into(), ..Call::default() };
        assert_eq!(read(&call), "input `pixel_values`: is missing");
    }
}
