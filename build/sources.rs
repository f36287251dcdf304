//! The families of kernels, and a hash that says whether what was made from one is still right.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Component, Path, PathBuf};

use super::{Result, context};

/// Flags of every compilation, in a form that nvcc reads; they count as a source of every family.
pub const FLAGS: &str = "kernels/nvcc.flags";

/// FNV-1a, 128 bits: tells edits apart, proves nothing about intent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hash(u128);

impl Hash {
    pub const fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    /// Adds a field. Line ends count as one whatever the checkout makes of them; a 0 ends the field.
    pub fn with(mut self, field: &[u8]) -> Self {
        for &byte in field.iter().filter(|&&byte| byte != b'\r').chain(&[0]) {
            self.0 =
                (self.0 ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
        self
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// One `kernels/*.cu`.
#[derive(Debug, Clone)]
pub struct Family {
    /// The file's name without `.cu`.
    pub name: String,
    /// Relative to the root.
    pub file: String,
    /// Bytes of the file: what takes longest to compile is started first.
    pub size: u64,
    /// Of the file, every header that it includes, and the flags.
    pub hash: Hash,
}

/// Every family below `root`, by name.
pub fn families(root: &Path) -> Result<Vec<Family>> {
    let folder = root.join("kernels");
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder).map_err(context(folder.display()))? {
        let path = entry.map_err(context(folder.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "cu") {
            let name = path.file_stem().and_then(|name| name.to_str());
            names.push(
                name.ok_or(format!("{}: not Unicode", path.display()))?
                    .to_owned(),
            );
        }
    }
    names.sort();
    names.into_iter().map(|name| family(root, name)).collect()
}

fn family(root: &Path, name: String) -> Result<Family> {
    let file = format!("kernels/{name}.cu");
    let mut files = BTreeMap::new();
    gather(root, Path::new(&file), &mut files)?;
    gather(root, Path::new(FLAGS), &mut files)?;
    let hash = files.iter().fold(Hash::new(), |hash, (path, text)| {
        hash.with(path.as_bytes()).with(text)
    });
    let size = files.get(&file).map_or(0, |text| text.len() as u64);
    Ok(Family {
        name,
        file,
        size,
        hash,
    })
}

/// Reads a file and, if they exist, the files that it includes in quotes.
///
/// `kernels/host/` is left out: it stands in for CUDA where there is none, and nvcc never reads it.
fn gather(root: &Path, path: &Path, files: &mut BTreeMap<String, Vec<u8>>) -> Result<()> {
    let key = path.to_string_lossy().replace('\\', "/");
    if files.contains_key(&key) {
        return Ok(());
    }
    let text = fs::read(root.join(path)).map_err(context(path.display()))?;
    let names = included(&String::from_utf8_lossy(&text));
    files.insert(key, text);
    for name in names {
        let beside = normal(&path.parent().unwrap_or(Path::new("")).join(&name));
        let in_kernels = normal(&Path::new("kernels").join(&name));
        let found = [beside, in_kernels]
            .into_iter()
            .find(|path| root.join(path).is_file());
        if let Some(found) = found
            && !found.starts_with("kernels/host")
        {
            gather(root, &found, files)?;
        }
    }
    Ok(())
}

/// The names in `#include "…"`, whatever the conditions around them.
fn included(text: &str) -> Vec<String> {
    let name = |line: &str| {
        let rest = line.trim_start().strip_prefix('#')?.trim_start();
        let rest = rest
            .strip_prefix("include")?
            .trim_start()
            .strip_prefix('"')?;
        Some(rest.split_once('"')?.0.to_owned())
    };
    text.lines().filter_map(name).collect()
}

/// The path without `.` and `..`.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                normal.pop();
            }
            part => normal.push(part),
        }
    }
    normal
}
