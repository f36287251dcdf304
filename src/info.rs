//! What this build has, and what the machine has for it.

use std::path::{Path, PathBuf};

/// The text of `dtmem info`.
pub fn describe() -> String {
    let features = [
        ("cuda", cfg!(feature = "cuda")),
        ("cust", cfg!(feature = "cust")),
        ("host", cfg!(feature = "host")),
        ("nccl", cfg!(feature = "nccl")),
        ("nvtx", cfg!(feature = "nvtx")),
        ("trainer", true),
    ];
    let features = features.iter().filter(|(_, on)| *on).map(|(name, _)| *name);
    let cpu = cpu_name().unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let threads = rayon::current_num_threads();
    let mut lines = vec![
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("features", features.collect::<Vec<_>>().join(", ")),
        ("cpu", format!("{cpu}, {threads} threads")),
        ("simd", simd()),
        ("gpus", gpus()),
    ];
    for (index, image) in images().into_iter().enumerate() {
        lines.push((if index == 0 { "kernel images" } else { "" }, image));
    }
    let line = |(title, text)| format!("{title:<15}{text}\n");
    lines.into_iter().map(line).collect()
}

/// One line per kernel image of this binary.
fn images() -> Vec<String> {
    #[cfg(feature = "cuda")]
    let found = dtmem::ops::images::describe();
    #[cfg(not(feature = "cuda"))]
    let found = vec!["none in this build: it lacks the feature `cuda`".to_owned()];
    found
}

fn cpu_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The instruction sets that matter for matrix products.
fn simd() -> String {
    #[cfg(target_arch = "x86_64")]
    let found = [
        ("avx", is_x86_feature_detected!("avx")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx2", is_x86_feature_detected!("avx2")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
    ];
    #[cfg(target_arch = "aarch64")]
    let found = [("neon", std::arch::is_aarch64_feature_detected!("neon"))];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let found = [("", false)];
    let names: Vec<&str> = found
        .iter()
        .filter(|(_, has)| *has)
        .map(|(name, _)| *name)
        .collect();
    if names.is_empty() {
        "none of those this program looks for".to_owned()
    } else {
        names.join(", ")
    }
}

/// NVIDIA GPUs and the driver library, found without loading anything.
fn gpus() -> String {
    let entries = std::fs::read_dir("/proc/driver/nvidia/gpus");
    let names: Vec<String> = entries
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| std::fs::read_to_string(entry.path().join("information")).ok())
        .map(|text| {
            let model = text.lines().find_map(|line| line.strip_prefix("Model:"));
            model.unwrap_or("unnamed").trim().to_owned()
        })
        .collect();
    let devices = (0..64).filter(|number| Path::new(&format!("/dev/nvidia{number}")).exists());
    let devices = devices.count();
    let driver = match driver_library() {
        Some(path) => format!("driver library {}", path.display()),
        None => "no driver library (libcuda.so.1)".to_owned(),
    };
    match (names.len(), devices) {
        (0, 0) => format!("none found; {driver}"),
        (0, devices) => format!("{devices} found; {driver}"),
        _ => format!("{}; {driver}", names.join(", ")),
    }
}

fn driver_library() -> Option<PathBuf> {
    let configured = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    configured
        .split(':')
        .filter(|folder| !folder.is_empty())
        .chain([
            "/usr/lib/x86_64-linux-gnu",
            "/usr/lib/aarch64-linux-gnu",
            "/usr/lib64",
            "/usr/lib",
            "/usr/lib/wsl/lib",
            "/usr/local/cuda/compat",
        ])
        .map(|folder| Path::new(folder).join("libcuda.so.1"))
        .find(|path| path.exists())
}
