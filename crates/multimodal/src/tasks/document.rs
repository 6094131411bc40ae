//! Donut's tokens to JSON, as `transformers.DonutProcessor.token2json` reads them: `<s_total>12.50</s_total>` is a field,
//! `<sep/>` stands between the items of a list.

use serde_json::{Map, Value};

const SEPARATOR: &str = "<sep/>";

/// The fields that `text` holds; where it holds none, the text itself as `text_sequence`.
///
/// `is_token` says whether a word is a token of the vocabulary: a field's value `<yes/>` is then `yes`.
///
/// ```
/// use roofbench_multimodal::tasks::document::fields;
/// let text = "<s_menu><s_nm>Tea</s_nm><s_cnt>2</s_cnt><sep/><s_nm>Bun</s_nm></s_menu><s_total>4.50</s_total>";
/// let expected = serde_json::json!({"menu": [{"nm": "Tea", "cnt": "2"}, {"nm": "Bun"}], "total": "4.50"});
/// assert_eq!(fields(text, &|_| false), expected);
/// assert_eq!(fields("no fields", &|_| false), serde_json::json!({"text_sequence": "no fields"}));
/// ```
pub fn fields(text: &str, is_token: &dyn Fn(&str) -> bool) -> Value {
    let (mut items, rest) = items(text, is_token);
    match items.len() {
        0 => serde_json::json!({"text_sequence": rest}),
        1 => items.remove(0),
        _ => Value::Array(items),
    }
}

/// The items of a list, each an object, and what remains of the text.
fn items(text: &str, is_token: &dyn Fn(&str) -> bool) -> (Vec<Value>, String) {
    let (mut items, mut fields, mut rest) = (Vec::new(), Map::new(), text.to_owned());
    while let Some((start, name)) = opening(&rest) {
        let (open, close) = (format!("<s_{name}>"), format!("</s_{name}>"));
        let Some(end) = rest.find(&close) else {
            // never closed: as if it were not there
            rest = rest.replace(&open, "");
            continue;
        };
        if let Some(content) = rest.get(start + open.len()..end)
            && let Some(value) = value(content.trim(), is_token)
        {
            fields.insert(name, value);
        }
        rest = rest[end + close.len()..].trim().to_owned();
        if let Some(next) = rest.strip_prefix(SEPARATOR) {
            items.push(Value::Object(std::mem::take(&mut fields)));
            rest = next.to_owned();
        }
    }
    if !fields.is_empty() {
        items.push(Value::Object(fields));
    }
    (items, rest)
}

/// Where the first `<s_name>` begins, and the name.
fn opening(text: &str) -> Option<(usize, String)> {
    let start = text.find("<s_")?;
    let name = &text[start + 3..];
    name.find('>').map(|end| (start, name[..end].to_owned()))
}

/// The value of a field; nothing where it holds fields that are all empty.
fn value(content: &str, is_token: &dyn Fn(&str) -> bool) -> Option<Value> {
    let mut values = if content.contains("<s_") && content.contains("</s_") {
        items(content, is_token).0
    } else {
        let leaf = |leaf: &str| {
            let leaf = leaf.trim();
            let category = leaf.strip_prefix('<').and_then(|leaf| leaf.strip_suffix("/>"));
            category.filter(|_| is_token(leaf)).unwrap_or(leaf).into()
        };
        content.split(SEPARATOR).map(leaf).collect()
    };
    match values.len() {
        0 => None,
        1 => Some(values.remove(0)),
        _ => Some(Value::Array(values)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What `token2json` of transformers gives for these.
    #[test]
    fn texts_are_read_as_the_library_reads_them() {
        let read = |text: &str| fields(text, &|word| word == "<yes/>");
        for (text, expected) in [
            ("<s_a>1</s_a><s_b> 2 </s_b>", json!({"a": "1", "b": "2"})),
            ("<s_a>1<sep/>2</s_a>", json!({"a": ["1", "2"]})),
            ("<s_a><yes/></s_a><s_b><no/></s_b>", json!({"a": "yes", "b": "<no/>"})),
            ("<s_a><s_b>1</s_b></s_a>", json!({"a": {"b": "1"}})),
            ("<s_a>1</s_a><sep/><s_a>2</s_a>", json!([{"a": "1"}, {"a": "2"}])),
            ("<s_open>1<s_a>2</s_a>", json!({"a": "2"})),
            ("<s_a></s_a>", json!({"a": ""})),
            ("", json!({"text_sequence": ""})),
            ("<s_", json!({"text_sequence": "<s_"})),
        ] {
            assert_eq!(read(text), expected, "{text}");
        }
    }

    #[test]
    fn closing_before_opening_ends() {
        assert_eq!(fields("</s_a><s_a>1</s_a>", &|_| false), json!({"a": "1"}));
    }
}
