//! What a person says, in the form that a checkpoint was trained to hear it in.

use std::path::PathBuf;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, context};
use roofbench_core::session::SessionError;
use roofbench_core::weights::Weights;
use serde_json::Value;

/// Where a picture stands in a text.
pub(super) const IMAGE: &str = "<image>";

/// Files that hold a template as the field `chat_template`.
const FILES: [&str; 3] = ["chat_template.json", "processor_config.json", "tokenizer_config.json"];

/// Steps that a template may take; a chat takes some hundreds.
const FUEL: u64 = 1_000_000;

/// The chat template of a checkpoint, or that of LLaVA-1.5 where it has none.
#[derive(Debug, Clone)]
pub(super) struct ChatTemplate {
    source: Option<(PathBuf, String)>,
}

impl ChatTemplate {
    /// Looks for it beside the weights.
    pub(super) fn of(weights: &Weights) -> Result<Self, SessionError> {
        let read = |path: &PathBuf| {
            let failed = |reason: String| SessionError::File { path: path.clone(), reason };
            std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))
        };
        if let Some(path) = weights.file("chat_template.jinja") {
            return Ok(Self { source: Some((path.clone(), read(&path)?)) });
        }
        for path in FILES.into_iter().filter_map(|name| weights.file(name)) {
            let failed =
                |error: serde_json::Error| SessionError::File { path: path.clone(), reason: error.to_string() };
            let json: Value = serde_json::from_str(&read(&path)?).map_err(failed)?;
            if let Some(template) = json.get("chat_template").and_then(Value::as_str) {
                return Ok(Self { source: Some((path.clone(), template.to_owned())) });
            }
        }
        Ok(Self { source: None })
    }

    /// A user's `text` about `pictures` pictures, up to where the answer begins.
    pub(super) fn prompt(&self, text: &str, pictures: usize) -> Result<String, SessionError> {
        let Some((path, template)) = &self.source else {
            return Ok(format!("USER: {}{text} ASSISTANT:", format!("{IMAGE}\n").repeat(pictures)));
        };
        let failed = |error: minijinja::Error| SessionError::File {
            path: path.clone(),
            reason: format!("chat_template: {error}"),
        };
        // as the library renders them
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(failed)?;
        // marks for training, which are no Jinja
        let template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "");
        let mut environment = Environment::new();
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        let mut content = vec![context! { type => "image" }; pictures];
        content.push(context! { type => "text", text => text });
        let messages = vec![context! { role => "user", content => content }];
        // the tokenizer adds the start token
        let chat = context! { messages => messages, add_generation_prompt => true, bos_token => "", eos_token => "" };
        environment.render_str(&template, chat).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate { source: Some(("chat_template.jinja".into(), source.to_owned())) }
    }

    #[test]
    fn templates_of_checkpoints_decide() -> Result<(), SessionError> {
        let source = "{% for message in messages %}{{ message['role'].upper() + ': ' }}\
            {% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}\
            {% for part in message['content'] | selectattr('type', 'equalto', 'text') %}\
            {% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endfor %}\
            {% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}";
        let expected = "USER: <image>\n<image>\nWhat differs? ASSISTANT:";
        assert_eq!(template(source).prompt("What differs?", 2)?, expected);
        assert_eq!(ChatTemplate { source: None }.prompt("What differs?", 2)?, expected);
        Ok(())
    }

    #[test]
    fn templates_that_fail_name_their_file() {
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}";
        for source in ["{% for %}", "{{ messages.nothing() }}", endless] {
            let error = template(source).prompt("", 1).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(error.starts_with("chat_template.jinja: chat_template: "), "{error}");
        }
    }
}
