//! Compiles kernels/*.cu, the executor's own test kernels and its runtime with a C++ compiler.
//!
//! A source is preprocessed, translated (build/translate.rs), compiled to assembly (kernels
//! with the instrumentation that the executor's checks live on), given a table of source lines, and
//! assembled.

#[path = "build/translate.rs"]
mod translate;

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;

type Result<T> = std::result::Result<T, String>;

/// What is announced to the executor is what is executed, and each call has a line of its own.
const KERNEL_FLAGS: &[&str] = &[
    "-std=c++17",
    "-g1", // lines only
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=alignment,bounds,shift,integer-divide-by-zero,signed-integer-overflow",
    "-ftrivial-auto-var-init=pattern", // registers that nobody set hold the same nonsense in every run
    "-fno-optimize-sibling-calls",     // a call has its caller's return address
    "-fno-tree-tail-merge",            // a call has one line
    "-fno-crossjumping",
    "-fno-strict-aliasing", // as nvcc
    "-ffp-contract=off",
    "-fno-exceptions",
    "-fno-rtti",
    "-fvisibility=hidden",
    "-Wno-unknown-pragmas",
    "-Wno-pragmas",
];

const RUNTIME_FLAGS: &[&str] = &[
    "-std=c++20",
    "-DDTMEM_RUNTIME",
    "-fno-exceptions",
    "-fno-rtti",
    "-fvisibility=hidden",
    "-Wno-format-zero-length",
];

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<()> {
    if std::env::var_os("CARGO_FEATURE_KERNELS").is_none() {
        return Ok(());
    }
    for path in [
        "build.rs",
        "build",
        "include",
        "runtime",
        "tests/kernels",
        "..",
    ] {
        println!("cargo::rerun-if-changed={path}");
    }
    for name in ["CXX", "CXXFLAGS"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let host = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let kernels = host.parent().ok_or("the crate has no parent folder")?;
    let out = PathBuf::from(variable("OUT_DIR")?);

    let mut base = cc::Build::new();
    base.cpp(true)
        .cargo_metadata(false)
        .opt_level(2)
        .warnings(true)
        .define("DTMEM_HOST", None)
        .include(kernels)
        .include(host.join("include"))
        .flag("-include")
        .flag("cuda_host.h");
    let compiler = base
        .try_get_compiler()
        .map_err(|error| format!("no C++ compiler: {error}"))?;
    if !compiler.is_like_gnu() {
        return Err(format!(
            "{} is not g++: set CXX=g++",
            compiler.path().display()
        ));
    }

    let mut sources = Vec::new();
    for (folder, extension, flags) in [
        (kernels.to_path_buf(), "cu", KERNEL_FLAGS),
        (host.join("tests/kernels"), "cu", KERNEL_FLAGS),
        (host.join("runtime"), "cpp", RUNTIME_FLAGS),
    ] {
        let found = files(&folder, extension)?;
        sources.extend(found.into_iter().map(|source| (source, flags)));
    }
    let objects = each_in_parallel(&sources, |(source, flags)| {
        compile(&compiler, flags, kernels, source, &out)
            .map_err(|message| format!("{}: {message}", source.display()))
    })?;
    let mut archive = cc::Build::new();
    archive.cpp(true).cargo_metadata(false).objects(objects);
    archive
        .try_compile("dtmem_host_kernels")
        .map_err(|error| error.to_string())?;

    println!("cargo::rustc-link-search=native={}", out.display());
    // Kernels register themselves when the program starts: nothing refers to them by name.
    println!("cargo::rustc-link-lib=static:+whole-archive=dtmem_host_kernels");
    println!("cargo::rustc-link-lib=stdc++");
    Ok(())
}

/// The object file of a source. It is made anew only if the preprocessed text or the way there has
/// changed.
fn compile(
    compiler: &cc::Tool,
    flags: &[&str],
    kernels: &Path,
    source: &Path,
    out: &Path,
) -> Result<PathBuf> {
    let name = source.file_name().unwrap_or_default().to_string_lossy();
    let path = |extension: &str| out.join(format!("{name}.{extension}"));
    let (translated, annotated, object) = (path("ii"), path("s"), path("o"));
    let mut preprocessor = compiler.to_command();
    preprocessor
        .args(flags)
        .args(["-x", "c++", "-E"])
        .arg(source);
    let preprocessed = run(&mut preprocessor)?;

    let mut command = Command::new(compiler.path());
    // Includes and definitions are in the preprocessed text already.
    let plain = compiler.args().iter().filter(|flag| {
        let flag = flag.to_string_lossy();
        ["-O", "-W", "-f", "-m"]
            .iter()
            .any(|kind| flag.starts_with(kind))
    });
    command.args(plain).args(flags).arg("-fpreprocessed");
    command.arg("-S").arg(&translated).arg("-o").arg("-");

    let mut way = DefaultHasher::new();
    (format!("{command:?}"), include_str!("build/translate.rs")).hash(&mut way);
    let text = format!(
        "// {:x}\n{}",
        way.finish(),
        translate::kernels_to_cpp(&preprocessed)?
    );
    if object.exists() && fs::read_to_string(&translated).is_ok_and(|before| before == text) {
        return Ok(object);
    }
    let _ = fs::remove_file(&object); // whatever fails below: the text is not taken for compiled
    write(&translated, &text)?;
    let assembly = run(&mut command)?;
    write(&annotated, &translate::with_line_table(&assembly, kernels))?;
    let mut assembler = compiler.to_command();
    run(assembler.arg("-c").arg(&annotated).arg("-o").arg(&object))?;
    Ok(object)
}

/// The standard output of a command that succeeds; its warnings are shown.
fn run(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .map_err(|error| format!("{}: {error}", command.get_program().display()))?;
    let messages = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{command:?}\n{messages}"));
    }
    for line in messages.lines().filter(|line| line.contains("warning:")) {
        println!("cargo::warning={line}");
    }
    String::from_utf8(output.stdout).map_err(|error| error.to_string())
}

/// Runs `job` for every item on as many threads as cargo grants, and keeps the order.
fn each_in_parallel<T: Sync, U: Send>(
    items: &[T],
    job: impl Fn(&T) -> Result<U> + Sync,
) -> Result<Vec<U>> {
    let threads = variable("NUM_JOBS")?
        .parse()
        .unwrap_or(1)
        .min(items.len())
        .max(1);
    let waiting = Mutex::new(items.iter().enumerate());
    let done = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let next = waiting.lock().ok().and_then(|mut items| items.next());
                    let Some((index, item)) = next else { break };
                    let result = job(item);
                    if let Ok(mut done) = done.lock() {
                        done.push((index, result));
                    }
                }
            });
        }
    });
    let mut done = done.into_inner().map_err(|error| error.to_string())?;
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut files: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    files.sort();
    Ok(files)
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

fn variable(name: &str) -> Result<String> {
    std::env::var(name).map_err(|error| format!("{name}: {error}"))
}
