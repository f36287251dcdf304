//! Finding nvcc, and what to compile for.

use std::env::consts::EXE_SUFFIX;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Result, context};

/// Environment variables; an argument, so that tests need not set real ones.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// An nvcc that answers.
#[derive(Debug, Clone)]
pub struct Nvcc {
    pub program: PathBuf,
    /// `13.0.88`
    pub version: String,
    /// `NVCC_CCBIN`: the C++ compiler for the host's half; nvcc looks for one by itself otherwise.
    pub host_compiler: Option<OsString>,
}

/// Where nvcc may be, best first: `NVCC` (then nowhere else), the path, `CUDA_HOME`, `CUDA_PATH`,
/// `/usr/local/cuda`, `.cuda/` below the root.
pub fn candidates(root: &Path, environment: Environment) -> Vec<PathBuf> {
    let value = |name| environment(name).filter(|value| !value.is_empty());
    if let Some(nvcc) = value("NVCC") {
        return vec![nvcc.into()];
    }
    let program = |folder: PathBuf| folder.join(format!("nvcc{EXE_SUFFIX}"));
    let path = value("PATH").unwrap_or_default();
    let on_path: Vec<_> = std::env::split_paths(&path).map(program).collect();
    let homes = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(value)
        .map(PathBuf::from);
    let fixed = ["/usr/local/cuda".into(), root.join(".cuda/nvidia/cu13")];
    let in_homes = homes.chain(fixed).map(|home| program(home.join("bin")));
    on_path.into_iter().chain(in_homes).collect()
}

impl Nvcc {
    /// The first candidate that exists. One named by `NVCC` must answer.
    pub fn find(root: &Path, environment: Environment) -> Result<Option<Self>> {
        let named = environment("NVCC").is_some_and(|value| !value.is_empty());
        let host_compiler = environment("NVCC_CCBIN").filter(|value| !value.is_empty());
        for program in candidates(root, environment) {
            if !named && !program.is_file() {
                continue;
            }
            // Commands run in another folder; a bare name is looked up on the path.
            let program = if program.components().count() > 1 {
                std::path::absolute(&program).map_err(context(program.display()))?
            } else {
                program
            };
            let version = version(&program).map_err(context(format!(
                "{} (set NVCC to use another nvcc)",
                program.display()
            )))?;
            return Ok(Some(Self {
                program,
                version,
                host_compiler,
            }));
        }
        Ok(None)
    }

    /// `fatbinary`, which every toolkit has beside nvcc; a link to nvcc is followed.
    pub fn fatbinary(&self) -> PathBuf {
        let name = format!("fatbinary{EXE_SUFFIX}");
        let real = self.program.canonicalize().unwrap_or_default();
        let beside = [self.program.as_path(), &real].map(|nvcc| nvcc.with_file_name(&name));
        beside
            .into_iter()
            .find(|path| path.is_file())
            .unwrap_or(name.into())
    }
}

/// From `Cuda compilation tools, release 13.0, V13.0.88`.
fn version(program: &Path) -> Result<String> {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .map_err(|e| e.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text
        .lines()
        .find_map(|line| line.strip_prefix("Cuda")?.rsplit_once(", V"));
    match version {
        Some((_, version)) => Ok(version.trim().to_owned()),
        None => Err("--version names no version".to_owned()),
    }
}

/// What to compile for: `CUDA_COMPUTE_CAP` (`80,90a`), else the GPUs of this machine, else 80 and 90a.
///
/// Nothing is lost by compiling for 90a wherever 90 is meant: every chip of capability 9.0 has what
/// 90a adds. GPUs below 8.0 are left out.
pub fn architectures(
    wanted: Option<&str>,
    gpus: impl FnOnce() -> Vec<String>,
) -> Result<Vec<String>> {
    let mut found = Vec::new();
    if let Some(wanted) = wanted {
        for name in wanted
            .split([',', ';', ' '])
            .filter(|name| !name.is_empty())
        {
            found.push(architecture(name).map_err(context("CUDA_COMPUTE_CAP"))?);
        }
    }
    if found.is_empty() {
        found.extend(gpus().iter().filter_map(|gpu| architecture(gpu).ok()));
    }
    if found.is_empty() {
        found.extend(["80".to_owned(), "90a".to_owned()]);
    }
    found.sort_by_key(|name| (name.len(), name.clone()));
    found.dedup();
    Ok(found)
}

/// `8.0` or `80` → `80`
fn architecture(name: &str) -> Result<String> {
    let plain = name.trim().replace('.', "");
    let digits = plain.trim_end_matches(['a', 'f']);
    match digits.parse::<u32>() {
        Ok(90) => Ok("90a".to_owned()),
        Ok(80..=999) if plain.len() - digits.len() <= 1 => Ok(plain),
        _ => Err(format!(
            "found `{name}`, expected compute capabilities from 80 up, such as 80,90a"
        )),
    }
}

/// Compute capabilities of the GPUs here, as the driver's own tool prints them.
pub fn gpus_of_this_machine() -> Vec<String> {
    let arguments = ["--query-gpu=compute_cap", "--format=csv,noheader"];
    match Command::new("nvidia-smi").args(arguments).output() {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout);
            text.lines().map(|line| line.trim().to_owned()).collect()
        }
        _ => Vec::new(),
    }
}
