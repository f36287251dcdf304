use crate::Finding;

/// Why a launch failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No kernel of this name was compiled in.
    #[error("no kernel `{0}`: it must be extern \"C\" __global__ in a file of kernels/")]
    UnknownKernel(String),
    /// The arguments are not those of the kernel's declaration.
    #[error("{kernel}: {found} arguments, where it takes {expected}")]
    ArgumentCount {
        /// Name of the kernel.
        kernel: String,
        /// Parameters that it declares.
        expected: usize,
        /// Arguments that were passed.
        found: usize,
    },
    /// An argument of the wrong kind or size.
    #[error("{kernel}: argument {index} is {found}, where it takes {expected}")]
    ArgumentType {
        /// Name of the kernel.
        kernel: String,
        /// Index of the argument.
        index: usize,
        /// What the kernel declares.
        expected: String,
        /// What was passed.
        found: String,
    },
    /// A view that is not inside of one buffer of this executor.
    #[error(
        "{kernel}: argument {index} is a view of {bytes} bytes that lies in no buffer of this executor"
    )]
    ForeignView {
        /// Name of the kernel.
        kernel: String,
        /// Index of the argument.
        index: usize,
        /// Bytes of the view.
        bytes: usize,
    },
    /// The host reads or writes what is no buffer's.
    #[error(
        "{bytes} bytes do not lie in one buffer of this executor as elements of {element} bytes"
    )]
    NotHeld {
        /// Bytes of the view.
        bytes: usize,
        /// Bytes of an element.
        element: usize,
    },
    /// A tensor's map that no GPU would load boxes by.
    #[error("a tensor's map: {what} is {found}, expected {expected}")]
    Map {
        /// The field of [`Boxes`](crate::Boxes).
        what: &'static str,
        /// What was given.
        found: u64,
        /// What is possible.
        expected: &'static str,
    },
    /// A grid, block or cluster that no GPU would launch.
    #[error("{kernel}: {what} is {found:?}, expected {expected}")]
    Shape {
        /// Name of the kernel.
        kernel: String,
        /// `grid`, `block` or `cluster`.
        what: &'static str,
        /// Extents that were asked for.
        found: [u32; 3],
        /// What is possible.
        expected: String,
    },
    /// The kernel ran, and a check found a defect.
    #[error("{0}")]
    Finding(Box<Finding>),
}

/// The result of a launch.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The finding, if it is one.
    pub fn finding(&self) -> Option<&Finding> {
        match self {
            Self::Finding(finding) => Some(finding),
            _ => None,
        }
    }
}
