//! Named ranges in the timeline of a profiler, with the feature `nvtx`; nothing without it.

#[cfg(feature = "nvtx")]
use cudarc::nvtx;

/// A range that lasts as long as this lives.
#[derive(Debug)]
#[must_use]
pub struct Range {
    #[cfg(feature = "nvtx")]
    _range: Option<nvtx::Range>,
}

/// Starts a range, if there is a library that a profiler would hear it through.
#[cfg(feature = "nvtx")]
pub fn range(name: &str) -> Range {
    Range {
        _range: is_heard().then(|| nvtx::scoped_range(name)),
    }
}

/// Starts nothing: this binary was built without the feature `nvtx`.
#[cfg(not(feature = "nvtx"))]
pub fn range(_: &str) -> Range {
    Range {}
}

/// Whether ranges go anywhere.
pub fn is_heard() -> bool {
    #[cfg(feature = "nvtx")]
    {
        static PRESENT: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
        // SAFETY: loads a library; cudarc's calls panic without it.
        #[allow(unsafe_code)]
        let look = || unsafe { nvtx::sys::is_culib_present() };
        *PRESENT.get_or_init(look)
    }
    #[cfg(not(feature = "nvtx"))]
    false
}
