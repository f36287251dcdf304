//! For which sizes a backend is made.

/// The sizes of a model that a backend's operations take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Widths of an attention head; none: every width.
    pub head_widths: Option<&'static [usize]>,
    /// Largest width of a model.
    pub width: usize,
    /// Largest width of a model with a memory.
    pub memory_width: usize,
    /// Most slots of a memory.
    pub slots: usize,
    /// Largest rank of an adapter.
    pub rank: usize,
}

impl Limits {
    /// Every size will do.
    pub const NONE: Self = Self {
        head_widths: None,
        width: usize::MAX,
        memory_width: usize::MAX,
        slots: usize::MAX,
        rank: usize::MAX,
    };
}
