//! Embeds the kernels: fat binaries made by nvcc where there is one, otherwise the committed PTX.
//!
//! Read from the environment: `NVCC`, `CUDA_HOME`, `CUDA_PATH` and the path (where nvcc is),
//! `CUDA_COMPUTE_CAP` (what to compile for, such as `80,90a`), `NVCC_CCBIN` (the host's C++ compiler),
//! `DTMEM_REQUIRE_NVCC=1` (no nvcc is an error).

// The helpers serve other programs too.
#[allow(dead_code)]
#[path = "build/mod.rs"]
mod build;

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use build::compile::{CACHE, Compiler};
use build::manifest::{ARCHITECTURE, Manifest};
use build::nvcc::{self, Nvcc};
use build::sources::{self, Family};
use build::{Result, context};

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return ExitCode::SUCCESS;
    }
    match embed() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn embed() -> Result<()> {
    for path in ["kernels", "ptx"] {
        println!("cargo::rerun-if-changed={path}");
    }
    const VARIABLES: [&str; 7] = [
        "NVCC",
        "CUDA_HOME",
        "CUDA_PATH",
        "CUDA_COMPUTE_CAP",
        "NVCC_CCBIN",
        "DTMEM_REQUIRE_NVCC",
        "DOCS_RS",
    ];
    for name in VARIABLES {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let root = folder("CARGO_MANIFEST_DIR")?;
    let out = folder("OUT_DIR")?;
    let families = sources::families(&root)?;

    let nvcc = match env::var_os("DOCS_RS") {
        Some(_) => None,
        None => Nvcc::find(&root, &|name| env::var_os(name))?,
    };
    let images = match nvcc {
        Some(nvcc) => compiled(&root, &out, nvcc, &families)?,
        None if env::var_os("DTMEM_REQUIRE_NVCC").is_some_and(|value| value == "1") => {
            return Err(
                "DTMEM_REQUIRE_NVCC=1 and no nvcc: run scripts/install-nvcc, or set NVCC"
                    .to_owned(),
            );
        }
        None => committed(&root, &out, &families)?,
    };
    let text = format!("&[\n{images}]\n");
    fs::write(out.join("images.rs"), text).map_err(context("images.rs"))
}

fn folder(variable: &str) -> Result<PathBuf> {
    let path = env::var_os(variable).ok_or(format!("{variable} is not set"))?;
    Ok(path.into())
}

/// Entries of the table of images, from nvcc.
fn compiled(root: &Path, out: &Path, nvcc: Nvcc, families: &[Family]) -> Result<String> {
    println!("cargo::rerun-if-changed={}", nvcc.program.display());
    let wanted = env::var("CUDA_COMPUTE_CAP").ok();
    let architectures = nvcc::architectures(wanted.as_deref(), nvcc::gpus_of_this_machine)?;
    let mut names: Vec<_> = architectures
        .iter()
        .map(|name| format!("sm_{name}"))
        .collect();
    names.push(format!("compute_{ARCHITECTURE}"));
    let origin = format!(
        "Origin::Nvcc {{ version: {:?}, architectures: &{names:?} }}",
        nvcc.version
    );

    let compiler = Compiler::new(nvcc, root, &cache(out))?;
    let paths = compiler.fat_binaries(families, &architectures)?;
    for warning in compiler.warnings(families, ARCHITECTURE) {
        println!("cargo::warning={warning}");
    }
    let mut text = String::new();
    for (family, path) in families.iter().zip(paths) {
        let image = out.join(format!("{}.fatbin", family.name));
        fs::copy(&path, &image).map_err(context(path.display()))?;
        entry(&mut text, family, &image, &origin);
    }
    Ok(text)
}

/// Entries of the table of images, from the committed PTX. Files that are missing or stale are for
/// those who write kernels to know; `cargo test` fails on them.
fn committed(root: &Path, out: &Path, families: &[Family]) -> Result<String> {
    let manifest = Manifest::read(root)?;
    let mut text = String::new();
    for family in families {
        let fault = manifest.fault(root, family);
        if let Some(fault) = &fault {
            println!("cargo::warning={fault}");
        }
        let Ok(mut ptx) = fs::read(root.join(format!("ptx/{}.ptx", family.name))) else {
            continue;
        };
        ptx.push(0); // the driver finds the end of PTX by it
        let image = out.join(format!("{}.ptx", family.name));
        fs::write(&image, ptx).map_err(context(image.display()))?;
        let origin = format!(
            "Origin::CommittedPtx {{ version: {:?}, architecture: {:?}, current: {} }}",
            manifest.compiler,
            manifest.architectures,
            fault.is_none(),
        );
        entry(&mut text, family, &image, &origin);
    }
    Ok(text)
}

fn entry(text: &mut String, family: &Family, image: &Path, origin: &str) {
    let name = &family.name;
    let _ = writeln!(
        text,
        "    Image {{ family: {name:?}, bytes: aligned!({image:?}), origin: {origin} }},"
    );
}

/// A folder that all profiles share: this one is `<target>/<profile>/build/…/out`.
fn cache(out: &Path) -> PathBuf {
    let build = out.ancestors().find(|folder| folder.ends_with("build"));
    let target = build.and_then(|folder| folder.ancestors().nth(2));
    target.unwrap_or(out).join(CACHE)
}
