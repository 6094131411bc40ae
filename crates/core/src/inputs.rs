//! Arguments of a call, read by name and checked before a model sees them.

use candle_core::{DType, Tensor};
use serde_json::Value;

use crate::session::{Call, SessionError};

/// The arguments of a call of `forward`.
pub struct Inputs<'a> {
    call: &'a Call,
}

impl<'a> Inputs<'a> {
    /// Takes `forward` with any of the tensors `inputs` and the plain arguments `arguments`.
    ///
    /// What the class would heed and we don't (`inputs_embeds`, `output_attentions`) is refused, not ignored.
    ///
    /// # Errors
    /// Another method, or an argument that is in neither list.
    pub fn forward(call: &'a Call, inputs: &[&str], arguments: &[&str]) -> Result<Self, SessionError> {
        if call.method != "forward" {
            return Err(unsupported_method(call, "forward"));
        }
        let supported = [inputs, arguments].concat();
        known(call.inputs.keys(), inputs, &supported)?;
        known(call.arguments.keys(), arguments, &supported)?;
        Ok(Self { call })
    }

    /// Takes any method with any of the tensors `inputs`; its plain arguments are for another to read.
    ///
    /// # Errors
    /// An input that is not in the list.
    pub fn of_any_method(call: &'a Call, inputs: &[&str]) -> Result<Self, SessionError> {
        known(call.inputs.keys(), inputs, inputs)?;
        Ok(Self { call })
    }

    /// An input as it is, or `None` when the call leaves it out.
    pub fn optional(&self, name: &str) -> Option<&'a Tensor> {
        self.call.inputs.get(name)
    }

    fn required(&self, name: &str) -> Result<&'a Tensor, SessionError> {
        self.call.inputs.get(name).ok_or_else(|| SessionError::input(name, "is missing"))
    }

    /// Integers (batch, seq) as i64, neither dimension empty.
    ///
    /// # Errors
    /// It is missing, or has another shape or type.
    pub fn matrix(&self, name: &str) -> Result<Tensor, SessionError> {
        let tensor = self.required(name)?;
        match tensor.dims() {
            [batch, seq] if *batch > 0 && *seq > 0 => integers(name, tensor),
            shape => {
                let reason = format!("has shape {shape:?}, expected (batch, seq), neither of them 0");
                Err(SessionError::input(name, reason))
            }
        }
    }

    /// The same, or `None` when the call leaves them out.
    ///
    /// # Errors
    /// Another shape or type.
    pub fn optional_matrix(&self, name: &str) -> Result<Option<Tensor>, SessionError> {
        if self.call.inputs.contains_key(name) { self.matrix(name).map(Some) } else { Ok(None) }
    }

    /// Integers of the shape of `like` (input_ids) as i64, or `None` when the call leaves them out.
    ///
    /// # Errors
    /// Another shape or type.
    pub fn matrix_like(&self, name: &str, like: &Tensor) -> Result<Option<Tensor>, SessionError> {
        self.matrix_as(name, ("input_ids", like))
    }

    /// The same with the name of the input that the shape is from.
    ///
    /// # Errors
    /// Another shape or type.
    pub fn matrix_as(&self, name: &str, (of, like): (&str, &Tensor)) -> Result<Option<Tensor>, SessionError> {
        match self.call.inputs.get(name) {
            None => Ok(None),
            Some(tensor) if tensor.dims() == like.dims() => integers(name, tensor).map(Some),
            Some(tensor) => {
                let reason = format!("has shape {:?}, {of} have {:?}", tensor.dims(), like.dims());
                Err(SessionError::input(name, reason))
            }
        }
    }

    /// Integers of `shape` as i64, or `None` when the call leaves them out.
    ///
    /// # Errors
    /// Another shape or type.
    pub fn integers(&self, name: &str, shape: &[usize]) -> Result<Option<Tensor>, SessionError> {
        match self.call.inputs.get(name) {
            None => Ok(None),
            Some(tensor) if tensor.dims() == shape => integers(name, tensor).map(Some),
            Some(tensor) => {
                Err(SessionError::input(name, format!("has shape {:?}, expected {shape:?}", tensor.dims())))
            }
        }
    }

    /// Whether the call has the tensor.
    pub fn has(&self, name: &str) -> bool {
        self.call.inputs.contains_key(name)
    }

    /// Pictures: floats (batch, `channels`, height, width), no dimension 0.
    ///
    /// # Errors
    /// It is missing, or has another shape or type.
    pub fn pictures(&self, name: &str, channels: usize) -> Result<&'a Tensor, SessionError> {
        let tensor = self.required(name)?;
        match tensor.dims() {
            [batch, found, height, width] if *found == channels && batch * height * width > 0 => {}
            shape => {
                let expected = format!("(batch, channels = {channels}, height, width), none of them 0");
                return Err(SessionError::input(name, format!("has shape {shape:?}, expected {expected}")));
            }
        }
        if !tensor.dtype().is_float() {
            return Err(SessionError::input(name, format!("has type {:?}, expected floats", tensor.dtype())));
        }
        Ok(tensor)
    }

    /// Sounds: floats (batch, samples), neither dimension 0.
    ///
    /// # Errors
    /// It is missing, or has another shape or type.
    pub fn sounds(&self, name: &str) -> Result<&'a Tensor, SessionError> {
        let tensor = self.required(name)?;
        match tensor.dims() {
            [batch, samples] if batch * samples > 0 => {}
            shape => {
                let reason = format!("has shape {shape:?}, expected (batch, samples), neither of them 0");
                return Err(SessionError::input(name, reason));
            }
        }
        if !tensor.dtype().is_float() {
            return Err(SessionError::input(name, format!("has type {:?}, expected floats", tensor.dtype())));
        }
        Ok(tensor)
    }

    /// Floats of any shape without a dimension of 0.
    ///
    /// # Errors
    /// They are missing, empty or of another type.
    pub fn floats(&self, name: &str) -> Result<&'a Tensor, SessionError> {
        let tensor = self.required(name)?;
        if tensor.elem_count() == 0 {
            return Err(SessionError::input(name, format!("has shape {:?}, which is empty", tensor.dims())));
        }
        if !tensor.dtype().is_float() {
            return Err(SessionError::input(name, format!("has type {:?}, expected floats", tensor.dtype())));
        }
        Ok(tensor)
    }

    /// The same, or `None` when the call leaves them out.
    ///
    /// # Errors
    /// They are empty or of another type.
    pub fn optional_floats(&self, name: &str) -> Result<Option<&'a Tensor>, SessionError> {
        if self.call.inputs.contains_key(name) { self.floats(name).map(Some) } else { Ok(None) }
    }

    /// Floats of the dimensions `shape`, each a name and, where it is fixed, a size; none of them is 0.
    ///
    /// # Errors
    /// They are missing, or have another shape or type.
    pub fn floats_of(&self, name: &str, shape: &[(&str, Option<usize>)]) -> Result<&'a Tensor, SessionError> {
        let tensor = self.floats(name)?;
        let fits = |(found, (_, fixed)): (&usize, &(&str, Option<usize>))| fixed.is_none_or(|size| *found == size);
        if tensor.rank() == shape.len() && tensor.dims().iter().zip(shape).all(fits) {
            return Ok(tensor);
        }
        let dimension = |(name, fixed): &(&str, Option<usize>)| match fixed {
            Some(size) => format!("{name} = {size}"),
            None => (*name).to_owned(),
        };
        let expected = shape.iter().map(dimension).collect::<Vec<_>>().join(", ");
        Err(SessionError::input(name, format!("has shape {:?}, expected ({expected})", tensor.dims())))
    }

    /// The same, or `None` when the call leaves them out.
    ///
    /// # Errors
    /// Another shape or type.
    pub fn optional_floats_of(
        &self,
        name: &str,
        shape: &[(&str, Option<usize>)],
    ) -> Result<Option<&'a Tensor>, SessionError> {
        if self.call.inputs.contains_key(name) { self.floats_of(name, shape).map(Some) } else { Ok(None) }
    }

    /// A plain argument that is true or false; false when the call leaves it out.
    ///
    /// # Errors
    /// It is something else.
    pub fn flag(&self, name: &str) -> Result<bool, SessionError> {
        match self.call.arguments.get(name) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            Some(other) => Err(SessionError::input(name, format!("is {other}, expected true or false"))),
        }
    }
}

/// The answer to a call of a method that a class has not, or that is not supported.
pub fn unsupported_method(call: &Call, supported: &str) -> SessionError {
    SessionError::input("method", format!("`{}` is not supported; supported: {supported}", call.method))
}

/// Checks that each of `ids` (i64) is in [0, `limit`), where `limit` is `field` of config.json.
///
/// # Errors
/// Names the first that isn't.
pub fn in_range(name: &str, ids: &Tensor, field: &str, limit: usize) -> Result<(), SessionError> {
    let ids = ids.flatten_all()?.to_vec1::<i64>()?;
    match ids.iter().position(|&id| usize::try_from(id).map_or(true, |id| id >= limit)) {
        None => Ok(()),
        Some(at) => Err(SessionError::input(name, format!("element {at} is {}, beyond {field} = {limit}", ids[at]))),
    }
}

/// Checks that a mask (i64) holds 0 and 1 alone.
///
/// # Errors
/// Names the first value that is neither.
pub fn zero_or_one(name: &str, mask: &Tensor) -> Result<(), SessionError> {
    let mask = mask.flatten_all()?.to_vec1::<i64>()?;
    match mask.iter().position(|value| !matches!(value, 0 | 1)) {
        None => Ok(()),
        Some(at) => Err(SessionError::input(name, format!("element {at} is {}, neither 0 nor 1", mask[at]))),
    }
}

fn known<'a>(
    mut names: impl Iterator<Item = &'a String>,
    known: &[&str],
    supported: &[&str],
) -> Result<(), SessionError> {
    match names.find(|name| !known.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => {
            let reason = format!("is not supported for this class; supported: {}", supported.join(", "));
            Err(SessionError::input(name, reason))
        }
    }
}

fn integers(name: &str, tensor: &Tensor) -> Result<Tensor, SessionError> {
    if !tensor.dtype().is_int() {
        return Err(SessionError::input(name, format!("has type {:?}, expected integers", tensor.dtype())));
    }
    Ok(tensor.to_dtype(DType::I64)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use serde_json::json;

    use super::*;

    fn call(name: &str, tensor: Tensor) -> Call {
        Call { method: "forward".into(), inputs: [(name.to_string(), tensor)].into(), arguments: Default::default() }
    }

    fn message<T>(result: Result<T, SessionError>) -> String {
        result.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn tensors_that_the_class_does_not_take_are_refused_by_name() {
        let ids = Tensor::zeros((1, 2), DType::I64, &Device::Cpu).unwrap();
        let mut call = call("inputs_embeds", ids);
        let error = message(Inputs::forward(&call, &["input_ids"], &[]));
        assert_eq!(error, "input `inputs_embeds`: is not supported for this class; supported: input_ids");
        call.inputs.clear();
        assert_eq!(
            message(Inputs::forward(&call, &[], &[]).and_then(|inputs| inputs.matrix("input_ids"))),
            "input `input_ids`: is missing"
        );
        call.arguments.insert("output_attentions".into(), true.into());
        assert!(message(Inputs::forward(&call, &[], &[])).starts_with("input `output_attentions`: "));
        call.method = "generate".into();
        assert!(message(Inputs::forward(&call, &[], &[])).starts_with("input `method`: `generate`"));
    }

    #[test]
    fn shapes_and_types_of_integers_are_checked() {
        let cpu = &Device::Cpu;
        let read =
            |tensor: Tensor| Inputs::forward(&call("x", tensor), &["x"], &[]).and_then(|inputs| inputs.matrix("x"));
        assert_eq!(read(Tensor::new(&[[1u32, 2]], cpu).unwrap()).unwrap().dtype(), DType::I64);
        assert!(message(read(Tensor::new(&[1u32, 2], cpu).unwrap())).contains("has shape [2], expected (batch, seq)"));
        assert!(message(read(Tensor::zeros((0, 3), DType::I64, cpu).unwrap())).contains("has shape [0, 3]"));
        assert!(message(read(Tensor::new(&[[1f32]], cpu).unwrap())).contains("has type F32, expected integers"));

        let like = Tensor::zeros((1, 3), DType::I64, cpu).unwrap();
        let call = call("mask", Tensor::ones((1, 2), DType::I64, cpu).unwrap());
        let inputs = Inputs::forward(&call, &["mask"], &[]).unwrap();
        assert!(message(inputs.matrix_like("mask", &like)).contains("[1, 2], input_ids have [1, 3]"));
        assert!(inputs.matrix_like("other", &like).unwrap().is_none());
        assert!(
            message(inputs.matrix_as("mask", ("decoder_input_ids", &like))).contains("decoder_input_ids have [1, 3]")
        );
        assert_eq!(inputs.optional_matrix("mask").unwrap().map(|mask| mask.dims().to_vec()), Some(vec![1, 2]));
        assert!(inputs.optional_matrix("other").unwrap().is_none());
        assert!(inputs.has("mask") && !inputs.has("other"));
        assert_eq!(inputs.integers("mask", &[1, 2]).unwrap().map(|mask| mask.dims().to_vec()), Some(vec![1, 2]));
        assert!(inputs.integers("other", &[1, 2]).unwrap().is_none());
        assert!(message(inputs.integers("mask", &[2, 1])).contains("has shape [1, 2], expected [2, 1]"));
    }

    #[test]
    fn the_first_id_out_of_range_is_named() {
        let check = |ids: [i64; 3]| in_range("input_ids", &Tensor::new(&[ids], &Device::Cpu)?, "vocab_size", 5);
        assert!(check([0, 4, 2]).is_ok());
        assert_eq!(message(check([0, 5, 9])), "input `input_ids`: element 1 is 5, beyond vocab_size = 5");
        assert_eq!(message(check([0, 1, -1])), "input `input_ids`: element 2 is -1, beyond vocab_size = 5");
    }

    fn pixels(shape: &[usize], dtype: DType) -> Call {
        let tensor = Tensor::zeros(shape, dtype, &Device::Cpu).expect("zeros");
        Call { method: "forward".into(), inputs: [("pixel_values".into(), tensor)].into(), ..Call::default() }
    }

    fn read(call: &Call) -> String {
        let inputs = Inputs::forward(call, &["pixel_values"], &["interpolate"]);
        match inputs.and_then(|inputs| inputs.pictures("pixel_values", 3).and(inputs.flag("interpolate"))) {
            Ok(flag) => flag.to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn arguments_that_the_class_does_not_take_are_refused_by_name() {
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
    fn shapes_and_types_of_sounds_are_checked() {
        let read = |shape: &[usize], dtype| {
            let call = call("input_values", Tensor::zeros(shape, dtype, &Device::Cpu).unwrap());
            let inputs = Inputs::forward(&call, &["input_values"], &[]).unwrap();
            inputs.sounds("input_values").err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert_eq!(read(&[2, 5], DType::F32), "");
        assert!(read(&[5], DType::F32).starts_with("input `input_values`: has shape [5], expected (batch, samples)"));
        assert!(read(&[2, 0], DType::F32).contains("has shape [2, 0]"));
        assert_eq!(read(&[2, 5], DType::I64), "input `input_values`: has type I64, expected floats");
    }

    #[test]
    fn floats_of_any_shape_are_not_empty() {
        let read = |shape: &[usize], dtype| {
            let call = call("video", Tensor::zeros(shape, dtype, &Device::Cpu).unwrap());
            let inputs = Inputs::forward(&call, &["video", "other"], &[]).unwrap();
            assert!(inputs.optional_floats("other").unwrap().is_none());
            message(inputs.optional_floats("video"))
        };
        assert_eq!(read(&[2, 1, 5], DType::F32), "");
        assert_eq!(read(&[2, 0, 5], DType::F32), "input `video`: has shape [2, 0, 5], which is empty");
        assert_eq!(read(&[2], DType::U8), "input `video`: has type U8, expected floats");
    }

    #[test]
    fn dimensions_of_floats_are_named() {
        let call = call("x", Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap());
        let inputs = Inputs::of_any_method(&call, &["x"]).unwrap();
        assert_eq!(inputs.floats_of("x", &[("batch", None), ("bins", Some(3))]).unwrap().dims(), [2, 3]);
        let error = message(inputs.floats_of("x", &[("batch", None), ("bins", Some(4))]));
        assert_eq!(error, "input `x`: has shape [2, 3], expected (batch, bins = 4)");
        assert!(message(inputs.floats_of("x", &[("batch", None)])).contains("expected (batch)"));
        assert!(inputs.optional_floats_of("y", &[("batch", None)]).unwrap().is_none());
    }

    #[test]
    fn shapes_and_types_of_pictures_are_checked() {
        for shape in [&[3, 2, 2][..], &[1, 4, 2, 2], &[0, 3, 2, 2], &[1, 3, 2, 0]] {
            let message = read(&pixels(shape, DType::F32));
            assert!(message.starts_with(&format!("input `pixel_values`: has shape {shape:?}, expected")), "{message}");
        }
        assert_eq!(read(&pixels(&[1, 3, 2, 2], DType::U8)), "input `pixel_values`: has type U8, expected floats");
        let call = Call { method: "forward".into(), ..Call::default() };
        assert_eq!(read(&call), "input `pixel_values`: is missing");
    }
}
