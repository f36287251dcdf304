use thiserror::Error as ThisError;

/// What a reference operation returns.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation refused its arguments.
#[derive(Debug, Clone, PartialEq, Eq, ThisError)]
pub enum Error {
    /// An array has another shape than the operation needs.
    #[error("`{argument}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Name of the argument.
        argument: &'static str,
        /// The shape that was passed.
        found: Vec<usize>,
        /// The shape that fits the other arguments.
        expected: Vec<usize>,
    },
    /// A value is outside of what the operation accepts.
    #[error("`{argument}` is {found}, expected {expected}")]
    Value {
        /// Name of the argument.
        argument: &'static str,
        /// The offending value and where it stands.
        found: String,
        /// What would have been accepted.
        expected: String,
    },
}

impl Error {
    /// A [`Error::Value`] from anything printable.
    pub fn value(argument: &'static str, found: impl ToString, expected: impl ToString) -> Self {
        Self::Value {
            argument,
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }
}

/// Checks one shape.
pub(crate) fn check_shape(
    argument: &'static str,
    found: &[usize],
    expected: &[usize],
) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Shape {
        argument,
        found: found.to_vec(),
        expected: expected.to_vec(),
    })
}
