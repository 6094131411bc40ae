//! Tasks as people know them: texts, pictures and sounds in, an answer that can be read, seen or heard out.
//!
//! A modality's crate makes the task of a checkpoint (`task`); whoever has a session runs it:
//! [`Task::call`] prepares the inputs, the session computes, [`Task::answer`] says what came out.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::session::{Arguments, Call, Session, SessionError, Tensors};

/// What a person gives, one batch.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RawInputs {
    /// Texts: sentences, prompts, or questions about the pictures beside them.
    #[serde(default)]
    pub texts: Vec<String>,
    /// Picture files.
    #[serde(default)]
    pub images: Vec<PathBuf>,
    /// Sound files.
    #[serde(default)]
    pub audio: Vec<PathBuf>,
    /// Plain arguments of the call or of what comes before and after it, by the library's own names:
    /// `max_new_tokens`, `threshold`, `input_points`.
    #[serde(default)]
    pub arguments: Arguments,
    /// File that an answer to be seen or heard is written to.
    #[serde(default)]
    pub save: Option<PathBuf>,
}

impl RawInputs {
    /// The kinds that are given, with what each is called on the command line: `text`, `image`, `audio`.
    pub fn kinds(&self) -> Vec<&'static str> {
        let given = [("text", self.texts.len()), ("image", self.images.len()), ("audio", self.audio.len())];
        given.into_iter().filter(|(_, count)| *count > 0).map(|(kind, _)| kind).collect()
    }

    /// Items of the batch: as many as there are of the most numerous kind.
    pub fn batch(&self) -> usize {
        self.texts.len().max(self.images.len()).max(self.audio.len())
    }

    /// What a cell of them is called behind its method: `text+image/b2`.
    pub fn name(&self) -> String {
        format!("{}/b{}", self.kinds().join("+"), self.batch())
    }

    /// Refuses kinds that a task has no use for, and their absence where it needs them.
    ///
    /// # Errors
    /// Names the flag (`--image`) of the kind, and `family`.
    pub fn expect(&self, family: &str, kinds: &[&'static str]) -> Result<(), SessionError> {
        let given = self.kinds();
        let refuse = |kind: &str, reason: String| Err(SessionError::input(&format!("--{kind}"), reason));
        if let Some(kind) = given.iter().find(|kind| !kinds.contains(kind)) {
            return refuse(kind, format!("{family} takes none; give {}", flags(kinds)));
        }
        match kinds.iter().find(|kind| !given.contains(kind)) {
            Some(kind) => refuse(kind, format!("{family} needs one; give {}", flags(kinds))),
            None => Ok(()),
        }
    }
}

fn flags(kinds: &[&str]) -> String {
    kinds.iter().map(|kind| format!("--{kind}")).collect::<Vec<_>>().join(" and ")
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// A table.
    Table {
        /// Names of the columns.
        header: Vec<String>,
        /// Cells, as many in each row as there are columns.
        rows: Vec<Vec<String>>,
    },
    /// A line, or several.
    Text(String),
    /// A picture or sound was written to this file.
    Saved(PathBuf),
}

impl Answer {
    /// An empty table with `header`.
    pub fn table(header: &[&str], rows: Vec<Vec<String>>) -> Self {
        Self::Table { header: header.iter().map(|&name| name.to_owned()).collect(), rows }
    }
}

/// Rows of `name`, then what is said of it: the name stands in the first row only.
pub fn grouped(name: &str, rows: impl IntoIterator<Item = Vec<String>>) -> Vec<Vec<String>> {
    let named = |(at, row): (usize, Vec<String>)| {
        let name = if at == 0 { name.to_owned() } else { String::new() };
        [name].into_iter().chain(row).collect()
    };
    rows.into_iter().enumerate().map(named).collect()
}

/// A probability (0 to 1) in percent, with three digits.
pub fn percent(probability: f32) -> String {
    let value = 100.0 * f64::from(probability);
    if value > 0.0 && value < 0.005 {
        return "< 0.01 %".to_owned();
    }
    let decimals = if value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.decimals$} %")
}

/// `text` on one line, cut with an ellipsis where it is long.
pub fn shortened(text: &str) -> String {
    /// Characters that a table shows.
    const WIDTH: usize = 40;
    let text = text.replace(char::is_control, " ");
    if text.chars().count() <= WIDTH {
        return text;
    }
    text.chars().take(WIDTH - 1).chain(['…']).collect()
}

/// What people use a checkpoint for, with the inputs that they gave.
pub trait Task {
    /// What preparing the inputs is called in a record: `tokenization`, `preprocessing`, `feature extraction`.
    fn preparation(&self) -> &'static str;

    /// The call of the class that the raw inputs mean; made anew each time, so that it can be timed.
    ///
    /// # Errors
    /// Names the file, field or argument at fault.
    fn call(&self) -> Result<Call, SessionError>;

    /// Units of the family's cells (tokens, seconds of sound) that one call works through, where it is not one for each
    /// item.
    ///
    /// # Errors
    /// Outputs of an unexpected shape.
    fn amount(&self, _call: &Call, _outputs: &Tensors) -> Result<Option<f64>, SessionError> {
        Ok(None)
    }

    /// What the `outputs` of `call` mean to people; nothing where they mean nothing. `session` is the model, for answers
    /// that take more than one call.
    ///
    /// # Errors
    /// Outputs of an unexpected shape, labels in the config that don't fit them, or a file that can't be written.
    fn answer(&self, call: &Call, outputs: &Tensors, session: &mut dyn Session) -> Result<Vec<Answer>, SessionError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_kinds_are_named() {
        let raw = RawInputs { texts: vec!["a".into()], images: vec!["b.png".into(); 3], ..Default::default() };
        assert_eq!((raw.kinds(), raw.name()), (vec!["text", "image"], "text+image/b3".to_owned()));
        let message = |kinds: &[&'static str]| raw.expect("vit", kinds).map_err(|error| error.to_string());
        assert_eq!(message(&["text", "image"]), Ok(()));
        assert_eq!(message(&["image"]), Err("input `--text`: vit takes none; give --image".into()));
        assert!(message(&["text", "image", "audio"]).is_err_and(|m| m.starts_with("input `--audio`: vit needs one")));
    }

    #[test]
    fn answers_are_short() {
        assert_eq!([1e-9, 1e-4, 0.0567, 0.5, 1.0].map(percent), ["< 0.01 %", "0.01 %", "5.67 %", "50.0 %", "100 %"]);
        assert_eq!(shortened(&"ä\n".repeat(30)).chars().count(), 40);
        assert_eq!(grouped("x", [vec!["1".into()], vec!["2".into()]]), [["x", "1"], ["", "2"]]);
    }
}
