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

/// Offsets start at 0, do not decrease, and end at `end`.
pub(crate) fn check_offsets(argument: &'static str, offsets: &[i32], end: usize) -> Result<()> {
    let (Some(&first), Some(&last)) = (offsets.first(), offsets.last()) else {
        return Err(Error::value(argument, "empty", "at least the offset 0"));
    };
    if first != 0 {
        return Err(Error::value(argument, format!("{first} at 0"), "0"));
    }
    if let Some(at) = offsets.windows(2).position(|pair| pair[1] < pair[0]) {
        let found = format!("{} after {} at {}", offsets[at + 1], offsets[at], at + 1);
        return Err(Error::value(
            argument,
            found,
            "offsets that do not decrease",
        ));
    }
    if usize::try_from(last) != Ok(end) {
        let found = format!("{last} at {}", offsets.len() - 1);
        return Err(Error::value(argument, found, format!("{end} as the last")));
    }
    Ok(())
}
