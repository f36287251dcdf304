//! From TOML to a configuration, and back.

use std::path::Path;

use toml::{Table, Value};

use super::check::join;
use super::{Config, ConfigError, EvaluationConfig, Result, TrainConfig};
use crate::train::finetune;

impl Config {
    /// Reads a file, applies `key=value` overrides and checks everything that can be checked
    /// without the data. What `[finetune]` leaves open is taken from the base.
    pub fn load(file: &Path, overrides: &[String]) -> Result<Self> {
        Self::load_finetune(file, overrides, Table::new())
    }

    /// As [`Self::load`], with keys of `[finetune]` from elsewhere.
    pub fn load_finetune(file: &Path, overrides: &[String], finetune: Table) -> Result<Self> {
        let name = file.display().to_string();
        let text = std::fs::read_to_string(file).map_err(|error| ConfigError::Read {
            file: name.clone(),
            message: error.to_string(),
        })?;
        let mut table = read(&name, &text, overrides)?;
        if !finetune.is_empty() {
            let found = table
                .entry("finetune")
                .or_insert_with(|| Value::Table(Table::new()));
            match found.as_table_mut() {
                Some(found) => found.extend(finetune),
                None => return Err(ConfigError::value("finetune", &*found, "a table")),
            }
        }
        finetune::complete(&mut table)?;
        Self::from_table(&name, table, overrides)
    }

    /// As [`Self::load`], from text alone; `origin` stands for it in errors.
    pub fn parse(origin: &str, text: &str, overrides: &[String]) -> Result<Self> {
        Self::from_table(origin, read(origin, text, overrides)?, overrides)
    }

    /// As [`Self::parse`]; what `[finetune]` leaves open is taken from the base.
    pub fn parse_on_base(origin: &str, text: &str, overrides: &[String]) -> Result<Self> {
        let mut table = read(origin, text, overrides)?;
        finetune::complete(&mut table)?;
        Self::from_table(origin, table, overrides)
    }

    fn from_table(origin: &str, table: Table, overrides: &[String]) -> Result<Self> {
        let config: Self = serde_path_to_error::deserialize(table)
            .map_err(|error| describe(origin, overrides, &error))?;
        config.validate()?;
        Ok(config)
    }

    /// The whole configuration with its defaults, as TOML.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| ConfigError::Syntax {
            file: "the resolved configuration".to_owned(),
            message: error.to_string(),
        })
    }

    /// The first key in which another configuration would train another model, with its value
    /// there and here. How long a run goes on, what it logs and how it is evaluated may differ.
    pub fn difference(&self, other: &Self) -> Result<Option<(String, String, String)>> {
        let as_table = |config: &Self| -> Result<Table> {
            let mut config = config.clone();
            let defaults = TrainConfig::default();
            config.train.log_every = defaults.log_every;
            config.train.checkpoint_every = defaults.checkpoint_every;
            config.evaluation = EvaluationConfig::default();
            Table::try_from(config).map_err(|error| ConfigError::Syntax {
                file: "a configuration".to_owned(),
                message: error.to_string(),
            })
        };
        let (mine, theirs) = (as_table(self)?, as_table(other)?);
        Ok(first_difference("", &mine, &theirs))
    }
}

/// The table of a text, with its overrides.
fn read(origin: &str, text: &str, overrides: &[String]) -> Result<Table> {
    let mut table: Table = toml::from_str(text).map_err(|error| ConfigError::Syntax {
        file: origin.to_owned(),
        message: error.to_string().trim_end().to_owned(),
    })?;
    for argument in overrides {
        apply_override(&mut table, argument)?;
    }
    Ok(table)
}

/// Sets a dotted key. The value is TOML, or else a string; an empty one removes the key, which
/// brings its default back. `train.steps` and `train.epochs` replace each other.
pub(crate) fn apply_override(table: &mut Table, argument: &str) -> Result<()> {
    let error = |message: String| ConfigError::Override {
        argument: argument.to_owned(),
        message,
    };
    let (path, text) = argument
        .split_once('=')
        .ok_or_else(|| error("expected key=value, such as train.steps=1000".to_owned()))?;
    let (path, text) = (path.trim(), text.trim());
    let keys: Vec<&str> = path.split('.').map(str::trim).collect();
    let Some((last, tables)) = keys.split_last() else {
        return Err(error("expected a key before `=`".to_owned()));
    };
    if keys.iter().any(|key| key.is_empty()) {
        return Err(error(format!("`{path}` is not a dotted key")));
    }
    let mut current = table;
    let mut tables = tables.iter();
    while let Some(key) = tables.next() {
        let mut value = current
            .entry(*key)
            .or_insert_with(|| Value::Table(Table::new()));
        // The tables of a list are counted from 0: `tasks.1.share`.
        if let Value::Array(list) = value {
            let count = list.len();
            let number = tables.next().ok_or_else(|| {
                error(format!(
                    "`{key}` is a list: expected a key of one entry, such as {key}.0.share"
                ))
            })?;
            let place = number
                .parse()
                .ok()
                .and_then(|place: usize| list.get_mut(place));
            value = place.ok_or_else(|| {
                error(format!(
                    "`{key}` is a list of {count}, counted from 0: `{number}` is none of them"
                ))
            })?;
        }
        current = value
            .as_table_mut()
            .ok_or_else(|| error(format!("`{key}` is a value, not a table")))?;
    }
    if text.is_empty() {
        current.remove(*last);
        return Ok(());
    }
    match path {
        "train.steps" => current.remove("epochs"),
        "train.epochs" => current.remove("steps"),
        _ => None,
    };
    let value = toml::from_str::<Table>(&format!("value = {text}"))
        .ok()
        .filter(|parsed| parsed.len() == 1)
        .and_then(|mut parsed| parsed.remove("value"))
        .unwrap_or_else(|| Value::String(text.to_owned()));
    current.insert((*last).to_owned(), value);
    Ok(())
}

/// Turns serde's error into one that names the key, its table and, if it is unknown, the nearest
/// one. The valid keys are read from serde's own message, so they are listed in one place only:
/// the structs above.
pub(crate) fn describe(
    origin: &str,
    overrides: &[String],
    error: &serde_path_to_error::Error<toml::de::Error>,
) -> ConfigError {
    // `tasks[0].share` as `tasks.0.share`, as it is set.
    let path = error.path().to_string().replace('[', ".").replace(']', "");
    let path = if path == "." { "" } else { &path };
    let message = error.inner().message().trim();
    let origin_of = |key: &str| {
        overrides
            .iter()
            .rev()
            .find(|argument| {
                let set = argument.split('=').next().unwrap_or_default().trim();
                set == key || set.starts_with(&format!("{key}."))
            })
            .map_or_else(|| origin.to_owned(), |argument| format!("--set {argument}"))
    };
    let mut quoted = message.split('`').skip(1).step_by(2);
    if message.starts_with("unknown field")
        && let Some(key) = quoted.next()
    {
        let valid: Vec<&str> = quoted.collect();
        let table = path.strip_suffix(key).map_or(path, |t| {
            if t.is_empty() || t.ends_with('.') {
                t.trim_end_matches('.')
            } else {
                path
            }
        });
        let full = join(table, key);
        return ConfigError::UnknownKey {
            origin: origin_of(&full),
            key: key.to_owned(),
            table: if table.is_empty() {
                "the top level".to_owned()
            } else {
                format!("[{table}]")
            },
            hint: match nearest(key, &valid) {
                _ if valid.is_empty() => "this table has no keys".to_owned(),
                Some(nearest) => {
                    format!("did you mean `{nearest}`? Valid keys: {}", valid.join(", "))
                }
                None => format!("valid keys: {}", valid.join(", ")),
            },
        };
    }
    ConfigError::Type {
        origin: origin_of(path),
        key: if path.is_empty() {
            "the top level"
        } else {
            path
        }
        .to_owned(),
        message: in_words(message),
    }
}

/// Serde's message of a wrong type or value, for people who do not read Rust.
fn in_words(message: &str) -> String {
    const KINDS: [&str; 4] = [
        "invalid type: ",
        "invalid value: ",
        "invalid length ",
        "unknown variant ",
    ];
    let found = KINDS.iter().find_map(|kind| message.strip_prefix(kind));
    let Some((found, expected)) = found.and_then(|found| found.rsplit_once(", expected ")) else {
        return message.to_owned();
    };
    let expected = match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more",
        "f32" | "f64" => "a number",
        "a sequence" => "a list",
        "a map" => "a table",
        "variant identifier" => "a name",
        record
            if record.starts_with("struct ") || record.starts_with("internally tagged enum ") =>
        {
            "a table"
        }
        other => other,
    };
    format!("found {found}, expected {expected}")
}

/// The word that is fewest edits away, if it may have been meant: a third of its letters may differ.
fn nearest<'a>(word: &str, candidates: &[&'a str]) -> Option<&'a str> {
    let distances = candidates.iter().map(|candidate| {
        let distance = strsim::damerau_levenshtein(word, candidate);
        (distance, *candidate)
    });
    let (distance, candidate) = distances.min_by_key(|(distance, _)| *distance)?;
    let letters = word.chars().count().max(candidate.len());
    (3 * distance <= letters + 1).then_some(candidate)
}

fn first_difference(prefix: &str, a: &Table, b: &Table) -> Option<(String, String, String)> {
    let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    keys.into_iter().find_map(|key| {
        let path = join(prefix, key);
        let show = |value: Option<&Value>| value.map_or("nothing".to_owned(), Value::to_string);
        match (a.get(key), b.get(key)) {
            (Some(Value::Table(a)), Some(Value::Table(b))) => first_difference(&path, a, b),
            (a, b) if a == b => None,
            (a, b) => Some((path, show(a), show(b))),
        }
    })
}
