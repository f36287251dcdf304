//! The parameters of an operation, read from the metadata of a file.

use serde_json::{Map, Value};

use super::file::Problem;

/// The parameters of a file, taken out one by one so that what is left is unknown.
pub(super) struct Params {
    left: Map<String, Value>,
    known: Vec<&'static str>,
}

impl Params {
    /// From the JSON text of the metadata.
    pub fn read(text: &str) -> Result<Self, Problem> {
        let wrong = |found: String| Problem::new("metadata `params`", found, "a JSON object");
        match serde_json::from_str(text) {
            Ok(Value::Object(left)) => Ok(Self {
                left,
                known: Vec::new(),
            }),
            Ok(other) => Err(wrong(other.to_string())),
            Err(error) => Err(wrong(format!("no JSON ({error})"))),
        }
    }

    /// A parameter that may be missing or null.
    pub fn optional<T>(
        &mut self,
        name: &'static str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, Problem> {
        self.known.push(name);
        match self.left.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match read(&value) {
                Some(read) => Ok(Some(read)),
                None => Err(Problem::new(parameter(name), value, expected)),
            },
        }
    }

    /// A number that must be there.
    pub fn number(&mut self, name: &'static str) -> Result<f64, Problem> {
        let expected = "a number";
        let found = self.optional(name, expected, Value::as_f64)?;
        found.ok_or_else(|| Problem::new(parameter(name), "missing", expected))
    }

    /// A whole number that may be missing or null.
    pub fn count(&mut self, name: &'static str) -> Result<Option<usize>, Problem> {
        self.optional(name, "a whole number", count)
    }

    /// One of several words.
    pub fn word<T: Copy>(
        &mut self,
        name: &'static str,
        words: &[(&str, T)],
        default: Option<T>,
    ) -> Result<T, Problem> {
        let expected: Vec<String> = words.iter().map(|(word, _)| format!("{word:?}")).collect();
        let expected = expected.join(" or ");
        let read = |value: &Value| {
            let found = value.as_str()?;
            words
                .iter()
                .find(|(word, _)| *word == found)
                .map(|(_, meaning)| *meaning)
        };
        let found = self.optional(name, &expected, read)?.or(default);
        found.ok_or_else(|| Problem::new(parameter(name), "missing", expected))
    }

    /// Refuses what no one asked for.
    pub fn finish(self) -> Result<(), Problem> {
        let expected = match self.known.as_slice() {
            [] => "none".to_owned(),
            known => format!("one of {}", known.join(", ")),
        };
        match self.left.keys().next() {
            None => Ok(()),
            Some(name) => Err(Problem::new(parameter(name), "unknown", expected)),
        }
    }
}

/// What an error calls a parameter.
pub(super) fn parameter(name: &str) -> String {
    format!("parameter `{name}`")
}

/// A whole number, not negative.
pub(super) fn count(value: &Value) -> Option<usize> {
    usize::try_from(value.as_u64()?).ok()
}
