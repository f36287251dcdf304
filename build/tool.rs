//! What `scripts/kernels` runs: `update-ptx`, `check-ptx`, or `cubins ARCHITECTURES [FAMILY…]`.

// Each program that includes these modules uses a part of them.
#[allow(dead_code)]
#[path = "mod.rs"]
mod build;

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use build::compile::{CACHE, Compiler, in_parallel};
use build::manifest::{self, ARCHITECTURE, Entry, Manifest};
use build::nvcc::{self, Nvcc};
use build::sources::{self, Family};
use build::{Result, context};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let root = env::current_dir().map_err(|error| error.to_string())?;
    let arguments: Vec<String> = env::args().skip(1).collect();
    let families = sources::families(&root)?;
    let nvcc = Nvcc::find(&root, &|name| env::var_os(name))?;
    let nvcc = nvcc.ok_or("no nvcc: scripts/install-nvcc, or set NVCC")?;
    let target = env::var_os("CARGO_TARGET_DIR").unwrap_or("target".into());
    let compiler = Compiler::new(nvcc.clone(), &root, &root.join(target).join(CACHE))?;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["update-ptx"] => update(&root, &families, &compiler, nvcc.version),
        ["check-ptx"] => check(&root, &families, &compiler, &nvcc.version),
        ["cubins", architectures, names @ ..] => {
            cubins(families, &compiler, &nvcc, architectures, names)
        }
        _ => Err("update-ptx, check-ptx, or cubins ARCHITECTURES [FAMILY…]".to_owned()),
    }
}

/// Replaces the PTX of every family whose sources or compiler changed.
fn update(root: &Path, families: &[Family], compiler: &Compiler, version: String) -> Result<()> {
    let old = Manifest::read(root).unwrap_or_default();
    let folder = root.join("ptx");
    fs::create_dir_all(&folder).map_err(context(folder.display()))?;
    let mut new = Manifest {
        compiler: version,
        architectures: format!("compute_{ARCHITECTURE}"),
        families: BTreeMap::new(),
    };
    let paths = in_parallel(families, |family| compiler.ptx(family, ARCHITECTURE))?;
    for (family, path) in families.iter().zip(paths) {
        let ptx = fs::read(&path).map_err(context(path.display()))?;
        let entry = Entry::new(family, &ptx);
        if old.families.get(&family.name) != Some(&entry) {
            println!("ptx/{}.ptx: {} bytes", family.name, ptx.len());
        }
        let path = folder.join(format!("{}.ptx", family.name));
        fs::write(&path, ptx).map_err(context(path.display()))?;
        new.families.insert(family.name.clone(), entry);
    }
    for name in strangers(root, families)? {
        fs::remove_file(folder.join(&name)).map_err(context(&name))?;
        println!("ptx/{name}: removed");
    }
    fs::write(root.join(manifest::PATH), new.to_toml()).map_err(context(manifest::PATH))
}

/// What a caller sees of PTX: version, target, and the kernels with their parameters. The code
/// itself is not comparable: nvcc pairs loads and numbers registers differently from run to run.
fn interface(ptx: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(ptx);
    let seen = [".version", ".target", ".visible .entry", ".param"];
    let lines = text.lines().map(str::trim);
    lines
        .filter(|line| seen.iter().any(|start| line.starts_with(start)))
        .map(String::from)
        .collect()
}

/// Hashes first; then, with the compiler that the manifest names, what it makes of the sources.
fn check(root: &Path, families: &[Family], compiler: &Compiler, version: &str) -> Result<()> {
    let manifest = Manifest::read(root)?;
    let mut faults: Vec<_> = families
        .iter()
        .filter_map(|f| manifest.fault(root, f))
        .collect();
    faults.extend(
        strangers(root, families)?
            .into_iter()
            .map(|name| format!("ptx/{name} has no source")),
    );
    if manifest.compiler == version {
        let paths = in_parallel(families, |family| compiler.ptx(family, ARCHITECTURE))?;
        for (family, path) in families.iter().zip(paths) {
            let committed = root.join(format!("ptx/{}.ptx", family.name));
            let [made, kept] =
                [&path, &committed].map(|path| Some(interface(&fs::read(path).ok()?)));
            if made.is_none() || made != kept {
                faults.push(format!(
                    "ptx/{}.ptx is not what nvcc {version} makes",
                    family.name
                ));
            }
        }
    } else {
        println!(
            "nvcc is {version}, ptx/ is from {}: only hashes were compared",
            manifest.compiler
        );
    }
    if faults.is_empty() {
        println!("ptx/ fits its sources ({} families)", families.len());
        Ok(())
    } else {
        Err(format!("{}\nrun scripts/update-ptx", faults.join("\n")))
    }
}

/// Files in ptx/ that belong to no family.
fn strangers(root: &Path, families: &[Family]) -> Result<Vec<String>> {
    let mut strangers = Vec::new();
    for entry in fs::read_dir(root.join("ptx")).map_err(context("ptx"))? {
        let name = entry
            .map_err(context("ptx"))?
            .file_name()
            .to_string_lossy()
            .into_owned();
        let family = name.strip_suffix(".ptx");
        if family.is_some_and(|family| families.iter().all(|known| known.name != family)) {
            strangers.push(name);
        }
    }
    Ok(strangers)
}

/// Compiles, and prints lines of fields separated by tabs: nvcc and its version, then for each image
/// family, architecture, PTX, machine code.
fn cubins(
    mut families: Vec<Family>,
    compiler: &Compiler,
    nvcc: &Nvcc,
    architectures: &str,
    names: &[&str],
) -> Result<()> {
    for name in names {
        if families.iter().all(|family| family.name != *name) {
            return Err(format!("no kernels/{name}.cu"));
        }
    }
    families.retain(|family| names.is_empty() || names.contains(&family.name.as_str()));
    let architectures = nvcc::architectures(Some(architectures), Vec::new)?;
    compiler.machine_code(&families, &architectures)?;
    println!("{}\t{}", nvcc.program.display(), nvcc.version);
    for family in &families {
        for architecture in &architectures {
            let ptx = compiler.ptx(family, architecture)?;
            let cubin = compiler.cubin(family, architecture)?;
            println!(
                "{}\tsm_{architecture}\t{}\t{}",
                family.name,
                ptx.display(),
                cubin.display()
            );
        }
    }
    Ok(())
}
