//! Checks of config.json that every family makes: sizes within reason, numbers that mean something, and no field that
//! would change the result unheeded.

use serde_json::Value;

use crate::session::{ModelSpec, SessionError};

/// Far beyond any model, and the product of three still fits 64 bits.
const LARGEST: usize = 1 << 21;

/// The error of a field that is malformed.
pub fn invalid(field: &str, reason: impl Into<String>) -> SessionError {
    SessionError::Config { field: field.to_owned(), reason: reason.into() }
}

/// Checks that each is at least 1, and no larger than any model has it.
///
/// # Errors
/// Names the first that isn't.
pub fn sizes(fields: &[(&str, usize)]) -> Result<(), SessionError> {
    match fields.iter().find(|(_, size)| !(1..=LARGEST).contains(size)) {
        Some((field, size)) => Err(invalid(field, format!("{size} is not in 1..={LARGEST}"))),
        None => Ok(()),
    }
}

/// Checks that the first is a multiple of the second, which is not 0.
///
/// # Errors
/// Names both.
pub fn multiple((field, value): (&str, usize), (divisor_field, divisor): (&str, usize)) -> Result<(), SessionError> {
    if divisor > 0 && value.is_multiple_of(divisor) {
        return Ok(());
    }
    Err(invalid(field, format!("{value} is not a multiple of {divisor_field}, {divisor}")))
}

/// Checks that each is a number of 0 or more.
///
/// # Errors
/// Names the first that isn't.
pub fn not_negative(fields: &[(&str, f64)]) -> Result<(), SessionError> {
    match fields.iter().find(|(_, value)| !(value.is_finite() && *value >= 0.)) {
        Some((field, value)) => Err(invalid(field, format!("{value} is not a number of 0 or more"))),
        None => Ok(()),
    }
}

/// Refuses a field at another value than those that are `supported`; absent and null are.
///
/// ```
/// use roofbench_core::config::refuse_unless;
/// # use roofbench_core::session::{Engine, ModelSpec};
/// # let spec = ModelSpec {
/// #     family: "bert".into(), class: "BertModel".into(), config: serde_json::json!({"is_decoder": true}),
/// #     extra_configs: Default::default(), dtype: candle_core::DType::F32, device: candle_core::Device::Cpu,
/// #     engine: Engine::Roofbench,
/// # };
/// // config.json has `"is_decoder": true`
/// let error = refuse_unless(&spec, "is_decoder", &[false.into()]).unwrap_err().to_string();
/// assert_eq!(error, "config.json: `is_decoder` = true is not supported for bert; supported: false");
/// ```
///
/// # Errors
/// [`SessionError::UnsupportedConfig`].
pub fn refuse_unless(spec: &ModelSpec, field: &str, supported: &[Value]) -> Result<(), SessionError> {
    match spec.config.get(field) {
        None | Some(Value::Null) => Ok(()),
        Some(value) if supported.contains(value) => Ok(()),
        Some(value) => Err(unsupported(spec, field, value, supported)),
    }
}

/// The same with `defaults` for fields that config.json leaves out: of a class that reads the fields of another's
/// configuration, and has other values for absent ones. A field that is null is there.
///
/// ```
/// use roofbench_core::config::with_defaults;
/// # use roofbench_core::session::{Engine, ModelSpec};
/// # let spec = ModelSpec {
/// #     family: "mistral".into(), class: "MistralForCausalLM".into(), config: serde_json::json!({"head_dim": null}),
/// #     extra_configs: Default::default(), dtype: candle_core::DType::F32, device: candle_core::Device::Cpu,
/// #     engine: Engine::Roofbench,
/// # };
/// // config.json has `"head_dim": null`
/// let spec = with_defaults(&spec, &[("head_dim", 128.into()), ("num_key_value_heads", 8.into())]);
/// assert_eq!(spec.config, serde_json::json!({"head_dim": null, "num_key_value_heads": 8}));
/// ```
pub fn with_defaults(spec: &ModelSpec, defaults: &[(&str, Value)]) -> ModelSpec {
    let mut spec = spec.clone();
    if let Some(fields) = spec.config.as_object_mut() {
        for (field, value) in defaults {
            fields.entry(*field).or_insert_with(|| value.clone());
        }
    }
    spec
}

/// Reads the config that config.json holds in `field` with `read`, to which it is the whole file. It is empty where absent
/// or null. Errors name its fields with the place: `vision_config.hidden_size`.
///
/// ```
/// use roofbench_core::config::{nested, sizes};
/// # use roofbench_core::session::{Engine, ModelSpec};
/// # let spec = ModelSpec {
/// #     family: "clip".into(), class: "CLIPModel".into(), config: serde_json::json!({"text_config": {"hidden_size": 0}}),
/// #     extra_configs: Default::default(), dtype: candle_core::DType::F32, device: candle_core::Device::Cpu,
/// #     engine: Engine::Roofbench,
/// # };
/// // config.json has `"text_config": {"hidden_size": 0}`
/// let read = |part: &ModelSpec| sizes(&[("hidden_size", part.config["hidden_size"].as_u64().unwrap_or(1) as usize)]);
/// let error = nested(&spec, "text_config", read).unwrap_err().to_string();
/// assert!(error.starts_with("config.json: `text_config.hidden_size`: 0 is not in"));
/// ```
///
/// # Errors
/// Those of `read`, and what is no object.
pub fn nested<T>(
    spec: &ModelSpec,
    field: &str,
    read: impl FnOnce(&ModelSpec) -> Result<T, SessionError>,
) -> Result<T, SessionError> {
    let config = match spec.config.get(field) {
        None | Some(Value::Null) => Value::Object(Default::default()),
        Some(part @ Value::Object(_)) => part.clone(),
        Some(other) => return Err(invalid(field, format!("is {other}, expected an object"))),
    };
    let within = |inner: String| if inner == "." { field.to_owned() } else { format!("{field}.{inner}") };
    read(&ModelSpec { config, ..spec.clone() }).map_err(|error| match error {
        SessionError::Config { field, reason } => SessionError::Config { field: within(field), reason },
        SessionError::UnsupportedConfig { family, field, value, supported } => {
            SessionError::UnsupportedConfig { family, field: within(field), value, supported }
        }
        other => other,
    })
}

/// The refusal of `value` in `field`.
pub fn unsupported(spec: &ModelSpec, field: &str, value: &Value, supported: &[Value]) -> SessionError {
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    SessionError::UnsupportedConfig {
        family: spec.family.clone(),
        field: field.to_owned(),
        value: value.to_string(),
        supported: supported.iter().map(plain).collect::<Vec<_>>().join(", "),
    }
}

/// The refusal of the class of `spec`.
pub fn unsupported_class(spec: &ModelSpec, supported: &[&str]) -> SessionError {
    SessionError::UnsupportedClass {
        family: spec.family.clone(),
        class: spec.class.clone(),
        supported: supported.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_field() {
        let message = |result: Result<(), SessionError>| result.err().map(|e| e.to_string()).unwrap_or_default();
        assert_eq!(message(sizes(&[("a", 1), ("b", 0)])), format!("config.json: `b`: 0 is not in 1..={LARGEST}"));
        assert!(message(sizes(&[("a", usize::MAX)])).contains("`a`"));
        assert_eq!(message(multiple(("a", 7), ("b", 2))), "config.json: `a`: 7 is not a multiple of b, 2");
        assert!(message(multiple(("a", 7), ("b", 0))).contains("multiple"));
        assert_eq!(message(multiple(("a", 8), ("b", 2))), "");
        assert!(message(not_negative(&[("eps", -1.)])).contains("`eps`: -1 is not a number of 0 or more"));
        assert!(message(not_negative(&[("eps", f64::NAN)])).contains("NaN"));
    }
}
