//! Running nvcc: PTX, machine code, fat binaries. What was made is kept under a name that holds the
//! hash of everything it was made from, so nothing is made twice, whichever profile asks.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, SystemTime};

use super::manifest::ARCHITECTURE;
use super::nvcc::Nvcc;
use super::sources::{FLAGS, Family, Hash};
use super::{Result, context};

/// Folder for finished work, below the target folder.
pub const CACHE: &str = "dtmem-kernels";

/// Files that nobody asked for in this time are removed.
const KEPT: Duration = Duration::from_secs(3 * 24 * 3600);

/// nvcc with a folder of finished work.
#[derive(Debug)]
pub struct Compiler {
    nvcc: Nvcc,
    root: PathBuf,
    cache: PathBuf,
}

impl Compiler {
    /// Makes the folder `cache`. Commands run in `root`, so that no path of this machine gets into the code.
    pub fn new(nvcc: Nvcc, root: &Path, cache: &Path) -> Result<Self> {
        fs::create_dir_all(cache).map_err(context(cache.display()))?;
        let (root, cache) = (root.to_owned(), cache.to_owned());
        Ok(Self { nvcc, root, cache })
    }

    /// One image per family, in their order: machine code for each architecture, and PTX for chips
    /// that none of them fits.
    pub fn fat_binaries(
        &self,
        families: &[Family],
        architectures: &[String],
    ) -> Result<Vec<PathBuf>> {
        self.machine_code(families, architectures)?;
        in_parallel(families, |family| self.fat_binary(family, architectures))
    }

    /// What nvcc warned of when it made these families' PTX, now or in an earlier build.
    pub fn warnings(&self, families: &[Family], architecture: &str) -> Vec<String> {
        let logs = families.iter().map(|family| {
            let ptx = self.path(family, &with_lines(architecture));
            fs::read_to_string(ptx.with_extension("log")).unwrap_or_default()
        });
        let warnings = |log: String| -> Vec<_> {
            let lines = log.lines().filter(|line| line.contains(": warning"));
            lines.map(str::to_owned).collect()
        };
        logs.flat_map(warnings).collect()
    }

    /// Compiles every family for every architecture, the largest first.
    pub fn machine_code(&self, families: &[Family], architectures: &[String]) -> Result<()> {
        let mut largest_first: Vec<_> = families.iter().collect();
        largest_first.sort_by_key(|family| std::cmp::Reverse(family.size));
        let with = |family| {
            architectures
                .iter()
                .map(move |architecture| (family, architecture))
        };
        let jobs: Vec<_> = largest_first.into_iter().flat_map(with).collect();
        in_parallel(&jobs, |(family, architecture)| {
            self.cubin(family, architecture)
        })
        .map(|_| ())
    }

    /// PTX for a virtual architecture.
    pub fn ptx(&self, family: &Family, architecture: &str) -> Result<PathBuf> {
        let lines = self.ptx_with_lines(family, architecture)?;
        self.once(family, &format!("compute_{architecture}.ptx"), |out| {
            let ptx = fs::read_to_string(&lines).map_err(context(lines.display()))?;
            fs::write(out, without_lines(&ptx)).map_err(context(out.display()))?;
            Ok(String::new())
        })
    }

    /// The same with the lines of the sources, which profilers show beside the machine code.
    fn ptx_with_lines(&self, family: &Family, architecture: &str) -> Result<PathBuf> {
        self.once(family, &with_lines(architecture), |out| {
            let mut nvcc = self.nvcc();
            if let Some(program) = &self.nvcc.host_compiler {
                nvcc.arg("--compiler-bindir").arg(program);
            }
            nvcc.args(["--ptx", "--generate-line-info"])
                .arg(format!("--gpu-architecture=compute_{architecture}"));
            let said = self.run(nvcc.arg("--output-file").arg(out).arg(&family.file))?;
            let ptx = fs::read_to_string(out).map_err(context(out.display()))?;
            let ptx = below(&self.root, &without_module_id(&ptx));
            fs::write(out, ptx).map_err(context(out.display()))?;
            Ok(said)
        })
    }

    /// Machine code. What the assembler says of registers and spills is in the file beside it whose
    /// name ends in `.log`.
    pub fn cubin(&self, family: &Family, architecture: &str) -> Result<PathBuf> {
        let ptx = self.ptx_with_lines(family, architecture)?;
        self.once(family, &format!("sm_{architecture}.cubin"), |out| {
            let mut nvcc = self.nvcc();
            nvcc.args(["--cubin", "--generate-line-info"])
                .arg(format!("--gpu-architecture=sm_{architecture}"));
            nvcc.args(["--resource-usage", "--output-file"])
                .arg(out)
                .arg(&ptx);
            self.run(&mut nvcc)
        })
    }

    fn fat_binary(&self, family: &Family, architectures: &[String]) -> Result<PathBuf> {
        let ptx = (
            format!("kind=ptx,sm={ARCHITECTURE}"),
            self.ptx(family, ARCHITECTURE)?,
        );
        let mut parts = vec![ptx];
        for architecture in architectures {
            let kind = format!("kind=elf,sm={architecture}");
            parts.push((kind, self.cubin(family, architecture)?));
        }
        self.once(
            family,
            &format!("{}.fatbin", architectures.join("-")),
            |out| {
                let mut command = Command::new(self.nvcc.fatbinary());
                // Lines are most of an image, and compress well.
                command.args(["-64", "--compress-all"]);
                command.arg(option("--create=", out));
                for (kind, path) in &parts {
                    command.arg(option(&format!("--image3={kind},file="), path));
                }
                self.run(&mut command)
            },
        )
    }

    fn nvcc(&self) -> Command {
        let mut command = Command::new(&self.nvcc.program);
        command.args(["--options-file", FLAGS]);
        command
    }

    /// Where `<family>.….<kind>` of this compiler and these sources is.
    fn path(&self, family: &Family, kind: &str) -> PathBuf {
        let compiler = self.nvcc.host_compiler.as_deref().unwrap_or(OsStr::new(""));
        let key = Hash::new()
            .with(include_bytes!("compile.rs"))
            .with(family.hash.to_string().as_bytes())
            .with(self.nvcc.version.as_bytes())
            .with(compiler.as_encoded_bytes());
        self.cache.join(format!("{}.{key}.{kind}", family.name))
    }

    /// The file at `path`; `make` writes it if it is not there. What `make` returns goes into a file
    /// beside it.
    fn once(
        &self,
        family: &Family,
        kind: &str,
        make: impl FnOnce(&Path) -> Result<String>,
    ) -> Result<PathBuf> {
        let path = self.path(family, kind);
        let log = path.with_extension("log");
        if !(touch(&path) && touch(&log)) {
            self.clean();
            // Another build may be at the same file: each writes its own, and a rename is atomic.
            let unfinished = format!("{}-{}.{kind}", family.name, std::process::id());
            let unfinished = self.cache.join(unfinished);
            let said = make(&unfinished)?;
            fs::write(&log, said).map_err(context(log.display()))?;
            fs::rename(&unfinished, &path).map_err(context(path.display()))?;
        }
        Ok(path)
    }

    /// Removes what is old. Failing at it harms nothing.
    fn clean(&self) {
        for entry in fs::read_dir(&self.cache).into_iter().flatten().flatten() {
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            if modified.is_ok_and(|time| time.elapsed().is_ok_and(|age| age > KEPT)) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Runs to success and returns what it said.
    fn run(&self, command: &mut Command) -> Result<String> {
        let program = command.get_program().to_owned();
        let output = command
            .current_dir(&self.root)
            .output()
            .map_err(context(program.display()))?;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        if output.status.success() {
            Ok(said)
        } else {
            Err(format!("{command:?}: {}\n{said}", output.status))
        }
    }
}

/// Kind of the PTX that has lines.
fn with_lines(architecture: &str) -> String {
    format!("compute_{architecture}.lines.ptx")
}

/// PTX that names its sources by their paths below the root, wherever that is.
fn below(root: &Path, ptx: &str) -> String {
    let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
    ptx.replace(&format!("\"{}/", root.display()), "\"")
}

/// PTX without its lines: the same instructions.
pub fn without_lines(ptx: &str) -> String {
    // Files and names of functions come last, in place of an empty line.
    let (code, end) = match ptx.find("\n\t.file\t") {
        Some(end) => (&ptx[..=end], "\n"),
        None => (ptx, ""),
    };
    let lines = code.split_inclusive('\n');
    let instructions = lines.filter(|line| !line.starts_with("\t.loc\t"));
    instructions.chain([end]).collect()
}

/// PTX that does not depend on where the sources lie: nvcc puts 8 digits made from their folder into
/// the names of what a file has for itself.
pub fn without_module_id(ptx: &str) -> String {
    const DIGITS: usize = 8;
    let mut ptx = ptx.to_owned();
    for mark in ["_INTERNAL_", "_GLOBAL__N__"] {
        let mut parts = ptx.split(mark);
        let mut plain = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            plain.push_str(mark);
            match part.split_at_checked(DIGITS) {
                Some((id, rest)) if id.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                    plain.push_str(&"0".repeat(DIGITS));
                    plain.push_str(rest);
                }
                _ => plain.push_str(part),
            }
        }
        ptx = plain;
    }
    ptx
}

/// Marks a file as used now; false where there is none.
fn touch(path: &Path) -> bool {
    let file = fs::File::options().append(true).open(path);
    file.and_then(|file| file.set_modified(SystemTime::now()))
        .is_ok()
}

/// `--name=path` as one argument.
fn option(name: &str, path: &Path) -> std::ffi::OsString {
    let mut option = std::ffi::OsString::from(name);
    option.push(path);
    option
}

/// Results in the order of the jobs, which as many threads as there are cores take from the front.
pub fn in_parallel<T: Sync, R: Send>(
    jobs: &[T],
    run: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let left = Mutex::new(jobs.iter().enumerate());
    let done = Mutex::new(Vec::new());
    let threads = thread::available_parallelism()
        .map_or(1, usize::from)
        .min(jobs.len());
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((index, job)) = next(&left) {
                    let result = run(job);
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

/// A function of its own, so that the lock is not held while the job runs.
fn next<I: Iterator>(jobs: &Mutex<I>) -> Option<I::Item> {
    jobs.lock().ok()?.next()
}
