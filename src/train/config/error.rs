//! What can be wrong with a configuration.

use std::fmt::Display;

use thiserror::Error;

/// A configuration that cannot be used.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(
        "{file}: cannot read it: {message}; expected a configuration, such as configs/hallway-quick.toml"
    )]
    Read {
        /// The file.
        file: String,
        /// What the system says.
        message: String,
    },
    /// Not TOML.
    #[error("{file}: not TOML: {message}")]
    Syntax {
        /// Where it was read.
        file: String,
        /// What the parser says, with line and column.
        message: String,
    },
    /// A `--set` that is not `key=value`, or reaches into something that is no table.
    #[error("--set {argument}: {message}")]
    Override {
        /// The argument.
        argument: String,
        /// What is wrong.
        message: String,
    },
    /// A key that does not exist.
    #[error("{origin}: unknown key `{key}` in {table}: {hint}")]
    UnknownKey {
        /// File or argument.
        origin: String,
        /// The key.
        key: String,
        /// Where it stands.
        table: String,
        /// The nearest key, and all of them.
        hint: String,
    },
    /// A key of another type, or one that is missing.
    #[error("{origin}: `{key}`: {message}")]
    Type {
        /// File or argument.
        origin: String,
        /// The dotted key.
        key: String,
        /// Found and expected.
        message: String,
    },
    /// A value out of its range, or one that does not fit another.
    #[error("`{key}`: found {found}, expected {expected}")]
    Value {
        /// The dotted key.
        key: String,
        /// Its value.
        found: String,
        /// What it may be, and what to do.
        expected: String,
    },
}

impl ConfigError {
    /// A [`Self::Value`].
    pub(crate) fn value(
        key: impl Into<String>,
        found: impl Display,
        expected: impl Into<String>,
    ) -> Self {
        Self::Value {
            key: key.into(),
            found: found.to_string(),
            expected: expected.into(),
        }
    }
}

/// Result of a check.
pub type Result<T> = std::result::Result<T, ConfigError>;
