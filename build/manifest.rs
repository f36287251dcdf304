//! `ptx/manifest.toml`: which compiler made the committed PTX, and from what.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use super::sources::{Family, Hash};
use super::{Result, context};

/// Below the root.
pub const PATH: &str = "ptx/manifest.toml";

/// The committed PTX runs on chips of this compute capability and above.
pub const ARCHITECTURE: &str = "80";

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    /// Version of nvcc.
    pub compiler: String,
    /// What it compiled for: `compute_80`.
    pub architectures: String,
    pub families: BTreeMap<String, Entry>,
}

/// Hashes as they are printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Of the family's sources (`Family::hash`).
    pub sources: String,
    /// Of `ptx/<family>.ptx`.
    pub ptx: String,
}

impl Entry {
    pub fn new(family: &Family, ptx: &[u8]) -> Self {
        Self {
            sources: family.hash.to_string(),
            ptx: Hash::new().with(ptx).to_string(),
        }
    }
}

impl Manifest {
    pub fn read(root: &Path) -> Result<Self> {
        let text = fs::read_to_string(root.join(PATH)).map_err(context(PATH))?;
        Self::parse(&text).map_err(context(PATH))
    }

    /// Reads what `to_toml` writes: a head and one table per family, each value a plain string.
    pub fn parse(text: &str) -> Result<Self> {
        let mut tables = BTreeMap::from([(String::new(), BTreeMap::new())]);
        let mut table = String::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(name) = line
                .strip_prefix('[')
                .and_then(|line| line.strip_suffix(']'))
            {
                table = name.to_owned();
                tables.insert(table.clone(), BTreeMap::new());
            } else if let Some((key, value)) = line.split_once(" = ")
                && let Some(value) = value
                    .strip_prefix('"')
                    .and_then(|value| value.strip_suffix('"'))
            {
                let table = tables.entry(table.clone()).or_default();
                table.insert(key.to_owned(), value.to_owned());
            } else {
                return Err(format!(
                    "line {}: found `{line}`, expected key = \"value\"",
                    index + 1
                ));
            }
        }
        let head = tables.remove("").unwrap_or_default();
        let field = |table: &BTreeMap<String, String>, key: &str| {
            table.get(key).cloned().ok_or(format!("missing: {key}"))
        };
        let entry = |(name, table): (String, BTreeMap<String, String>)| {
            let sources = field(&table, "sources").map_err(context(format!("[{name}]")))?;
            let ptx = field(&table, "ptx").map_err(context(format!("[{name}]")))?;
            Ok((name, Entry { sources, ptx }))
        };
        Ok(Self {
            compiler: field(&head, "compiler")?,
            architectures: field(&head, "architectures")?,
            families: tables.into_iter().map(entry).collect::<Result<_>>()?,
        })
    }

    pub fn to_toml(&self) -> String {
        let mut text = format!(
            "# Written by scripts/update-ptx.\ncompiler = \"{}\"\narchitectures = \"{}\"\n",
            self.compiler, self.architectures,
        );
        for (name, Entry { sources, ptx }) in &self.families {
            let _ = write!(
                text,
                "\n[{name}]\nsources = \"{sources}\"\nptx = \"{ptx}\"\n"
            );
        }
        text
    }

    /// What is wrong with the committed PTX of a family; `None`: nothing.
    pub fn fault(&self, root: &Path, family: &Family) -> Option<String> {
        let name = &family.name;
        let Some(entry) = self.families.get(name) else {
            return Some(format!("{PATH} lacks the family {name}"));
        };
        let Ok(ptx) = fs::read(root.join(format!("ptx/{name}.ptx"))) else {
            return Some(format!("ptx/{name}.ptx cannot be read"));
        };
        let expected = Entry::new(family, &ptx);
        if entry.sources != expected.sources {
            Some(format!(
                "ptx/{name}.ptx is older than {} or its headers",
                family.file
            ))
        } else if entry.ptx != expected.ptx {
            Some(format!(
                "ptx/{name}.ptx is not the file that {PATH} describes"
            ))
        } else {
            None
        }
    }
}
