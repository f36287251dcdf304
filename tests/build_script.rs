//! What build.rs relies on, without nvcc: sources and their hash, the manifest of the committed PTX, the
//! search for nvcc, and compiling only what changed (with a script in the place of nvcc).

#![cfg(feature = "cuda")]

// Each program that includes these modules uses a part of them.
#[allow(dead_code)]
#[path = "../build/mod.rs"]
mod build;

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use build::compile::{in_parallel, without_lines, without_module_id};
use build::manifest::{Entry, Manifest};
use build::nvcc::{architectures, candidates};
use build::sources::{Family, Hash, families};
use tempfile::TempDir;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A folder with these files below it.
fn tree(files: &[(&str, &str)]) -> TempDir {
    let root = TempDir::new().unwrap();
    for (path, text) in files {
        write(root.path(), path, text);
    }
    root
}

fn write(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

/// Two families that share a header; the second includes more.
fn kernels() -> TempDir {
    tree(&[
        ("kernels/nvcc.flags", "--std=c++17"),
        ("kernels/a.cu", "#include \"common.cuh\"\n"),
        (
            "kernels/b.cu",
            "  #  include \"parts/deep.cuh\" // tiles\n#include <cuda_fp16.h>\n",
        ),
        (
            "kernels/common.cuh",
            "#pragma once\n#include \"host/cuda.h\"\n",
        ),
        (
            "kernels/parts/deep.cuh",
            "#include \"../common.cuh\"\n#include \"beside.cuh\"\n",
        ),
        (
            "kernels/parts/beside.cuh",
            "#include \"deep.cuh\"\n#include \"ptx.cuh\"\n",
        ),
        ("kernels/ptx.cuh", ""),
        ("kernels/host/cuda.h", ""),
        ("kernels/notes.md", ""),
    ])
}

fn hashes(root: &Path) -> [Hash; 2] {
    let found = families(root).unwrap();
    assert_eq!(names(&found), ["a", "b"]);
    [found[0].hash, found[1].hash]
}

fn names(families: &[Family]) -> Vec<&str> {
    families.iter().map(|family| family.name.as_str()).collect()
}

#[test]
fn the_committed_ptx_fits_the_kernels() {
    let manifest = Manifest::read(repository()).unwrap();
    let families = families(repository()).unwrap();
    let faults: Vec<_> = families
        .iter()
        .filter_map(|family| manifest.fault(repository(), family))
        .collect();
    assert!(
        faults.is_empty(),
        "{}\nrun scripts/update-ptx",
        faults.join("\n")
    );

    let listed: Vec<&str> = manifest.families.keys().map(String::as_str).collect();
    assert_eq!(listed, names(&families), "run scripts/update-ptx");
    let mut files: Vec<_> = fs::read_dir(repository().join("ptx"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter_map(|name| Some(name.strip_suffix(".ptx")?.to_owned()))
        .collect();
    files.sort();
    assert_eq!(files, listed, "run scripts/update-ptx");
}

#[test]
fn a_hash_follows_every_header_and_the_flags_but_not_the_stand_in_for_cuda() {
    let root = kernels();
    let [a, b] = hashes(root.path());
    assert_ne!(a, b);
    let changes = |path: &str| {
        let old = fs::read_to_string(root.path().join(path)).unwrap();
        write(root.path(), path, &format!("{old}// a change\n"));
        let new = hashes(root.path());
        write(root.path(), path, &old);
        assert_eq!(hashes(root.path()), [a, b]);
        [new[0] != a, new[1] != b]
    };
    assert_eq!(changes("kernels/a.cu"), [true, false]);
    assert_eq!(changes("kernels/b.cu"), [false, true]);
    assert_eq!(changes("kernels/common.cuh"), [true, true]);
    assert_eq!(changes("kernels/parts/beside.cuh"), [false, true]);
    assert_eq!(changes("kernels/ptx.cuh"), [false, true]);
    assert_eq!(changes("kernels/nvcc.flags"), [true, true]);
    assert_eq!(changes("kernels/host/cuda.h"), [false, false]);
    assert_eq!(changes("kernels/notes.md"), [false, false]);
}

#[test]
fn a_hash_is_the_same_for_any_line_ends_and_not_for_text_moved_between_files() {
    let root = kernels();
    let before = hashes(root.path());
    let text = fs::read_to_string(root.path().join("kernels/common.cuh")).unwrap();
    write(
        root.path(),
        "kernels/common.cuh",
        &text.replace('\n', "\r\n"),
    );
    assert_eq!(hashes(root.path()), before);
    assert_ne!(
        Hash::new().with(b"ab").with(b"c"),
        Hash::new().with(b"a").with(b"bc")
    );
}

#[test]
fn a_manifest_reads_back_and_is_toml() {
    let entry = |sources: &str, ptx: &str| Entry {
        sources: sources.to_owned(),
        ptx: ptx.to_owned(),
    };
    let manifest = Manifest {
        compiler: "13.0.88".to_owned(),
        architectures: "compute_80".to_owned(),
        families: [
            ("a".to_owned(), entry("01", "02")),
            ("b".to_owned(), entry("03", "04")),
        ]
        .into(),
    };
    let text = manifest.to_toml();
    assert_eq!(Manifest::parse(&text), Ok(manifest));
    #[cfg(feature = "trainer")]
    {
        let table: toml::Table = text.parse().unwrap();
        assert_eq!(table["compiler"].as_str(), Some("13.0.88"));
        assert_eq!(table["b"]["ptx"].as_str(), Some("04"));
    }

    for (damaged, expected) in [
        (text.replace("compiler", "author"), "missing: compiler"),
        (text.replace("ptx = \"04\"\n", ""), "[b]: missing: ptx"),
        (
            text.replace("= \"04\"", "= 04"),
            "line 11: found `ptx = 04`",
        ),
    ] {
        let message = Manifest::parse(&damaged).unwrap_err();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn a_family_without_its_ptx_is_a_fault_that_says_which_kind() {
    let root = kernels();
    let families = families(root.path()).unwrap();
    let ptx = "ptx of a";
    write(root.path(), "ptx/a.ptx", ptx);
    let manifest = Manifest {
        families: [("a".to_owned(), Entry::new(&families[0], ptx.as_bytes()))].into(),
        ..Manifest::default()
    };
    assert_eq!(manifest.fault(root.path(), &families[0]), None);
    let fault = |family: usize, expected: &str| {
        let families = build::sources::families(root.path()).unwrap();
        let fault = manifest
            .fault(root.path(), &families[family])
            .unwrap_or_default();
        assert!(fault.contains(expected), "{fault:?}");
    };
    fault(1, "lacks the family b");
    write(root.path(), "ptx/a.ptx", "something else");
    fault(0, "is not the file");
    write(root.path(), "kernels/a.cu", "// another kernel");
    fault(0, "is older than kernels/a.cu");
    fs::remove_file(root.path().join("ptx/a.ptx")).unwrap();
    fault(0, "cannot be read");
}

#[test]
fn nvcc_is_looked_for_in_the_documented_order() {
    let search = |variables: &[(&str, &str)]| {
        let variables: HashMap<_, _> = variables.iter().copied().collect();
        candidates(Path::new("root"), &|name| {
            variables.get(name).map(OsString::from)
        })
    };
    let nvcc =
        |folder: &str| Path::new(folder).join(format!("nvcc{}", std::env::consts::EXE_SUFFIX));
    let path = std::env::join_paths(["first", "second"]).unwrap();
    let variables = [
        ("CUDA_PATH", "path"),
        ("CUDA_HOME", "home"),
        ("PATH", path.to_str().unwrap()),
    ];
    let expected = [
        "first",
        "second",
        "home/bin",
        "path/bin",
        "/usr/local/cuda/bin",
    ]
    .map(nvcc);
    let found = search(&variables);
    assert_eq!(found[..5], expected);
    assert_eq!(found[5..], [nvcc("root/.cuda/nvidia/cu13/bin")]);
    // A named one is the only one, and an empty name is no name.
    let [home, path, on_path] = variables;
    assert_eq!(
        search(&[("NVCC", "mine"), home, path, on_path]),
        [PathBuf::from("mine")]
    );
    assert_eq!(search(&[("NVCC", ""), home, path, on_path]), found);
}

#[test]
fn architectures_come_from_the_variable_then_the_machine_then_the_defaults() {
    let gpus = |names: &[&str]| {
        names
            .iter()
            .map(|name| (*name).to_owned())
            .collect::<Vec<_>>()
    };
    let none = || Vec::new();
    assert_eq!(
        architectures(Some("90a, 80"), || gpus(&["8.6"])).unwrap(),
        ["80", "90a"]
    );
    assert_eq!(architectures(Some("8.0;9.0"), none).unwrap(), ["80", "90a"]);
    assert_eq!(
        architectures(Some("120a 100f"), none).unwrap(),
        ["100f", "120a"]
    );
    assert_eq!(architectures(Some(" "), || gpus(&["8.6"])).unwrap(), ["86"]);
    assert_eq!(
        architectures(None, || gpus(&["9.0", "9.0", "7.5", "12.0"])).unwrap(),
        ["120", "90a"]
    );
    assert_eq!(
        architectures(None, || gpus(&["7.5", "[N/A]"])).unwrap(),
        ["80", "90a"]
    );
    for wrong in ["75", "sm_80", "80aa", "a", "99999"] {
        let message = architectures(Some(wrong), none).unwrap_err();
        assert!(
            message.contains("CUDA_COMPUTE_CAP") && message.contains(wrong),
            "{message}"
        );
    }
}

#[test]
fn ptx_does_not_tell_the_folder_of_its_sources() {
    let ptx = |id: &str| {
        format!(
            ".shared _ZZN44_INTERNAL_{id}_13_layer_norm_cu_d6a0ecf546_GLOBAL__N__{id}_13_a 0f38b21133"
        )
    };
    assert_eq!(without_module_id(&ptx("38b21133")), ptx("00000000"));
    let short = "_INTERNAL_38b2 _GLOBAL__N__not-hexadecimal _INTERNAL_é_é_é_";
    assert_eq!(without_module_id(short), short);
}

#[test]
fn ptx_without_lines_has_the_same_instructions() {
    let plain = "\tmov.u32 %r1, 0;\n$L__tmp0:\n\tret;\n\n}\n\n";
    let lines = "\t.loc\t1 4 0\n\tmov.u32 %r1, 0;\n$L__tmp0:\n\t.loc\t1 5 2, function_name $L__info, inlined_at 1 4 0\n\
                 \tret;\n\n}\n\t.file\t1 \"kernels/a.cu\"\n\t.section\t.debug_str\n\t{\n.b8 0\n\t}\n";
    assert_eq!(without_lines(lines), plain);
    assert_eq!(without_lines(plain), plain);
}

#[test]
fn parallel_jobs_keep_their_order_and_report_a_failure() {
    let jobs: Vec<u32> = (0..10).collect();
    let longer_first = |job: &u32| {
        thread::sleep(Duration::from_millis(u64::from(10 - job)));
        Ok(job * 2)
    };
    assert_eq!(
        in_parallel(&jobs, longer_first).unwrap(),
        (0..20).step_by(2).collect::<Vec<_>>()
    );
    assert_eq!(in_parallel(&[], |_: &u32| Ok(())).unwrap(), []);
    let run = |job: &u32| {
        if *job == 7 {
            Err("seven".to_owned())
        } else {
            Ok(())
        }
    };
    assert_eq!(in_parallel(&jobs, run), Err("seven".to_owned()));
}

#[cfg(unix)]
mod with_a_script_for_nvcc {
    use super::*;
    use build::compile::Compiler;
    use build::nvcc::Nvcc;

    fn compiler(root: &Path) -> Compiler {
        let program = repository().join("tests/toolkit/nvcc");
        let nvcc = Nvcc::find(root, &|name| {
            (name == "NVCC").then(|| program.clone().into())
        });
        let nvcc = nvcc.unwrap().unwrap();
        assert_eq!(nvcc.version, "13.0.88");
        Compiler::new(nvcc, root, &root.join("cache")).unwrap()
    }

    /// Builds fat binaries of all families and returns the calls that it took.
    fn calls(root: &Path) -> Vec<String> {
        let architectures = ["80".to_owned(), "90a".to_owned()];
        let families = families(root).unwrap();
        let images = compiler(root)
            .fat_binaries(&families, &architectures)
            .unwrap();
        assert_eq!(images.len(), families.len());
        for image in images {
            assert_eq!(fs::read_to_string(image).unwrap(), "link\n");
        }
        let text = fs::read_to_string(root.join("calls")).unwrap_or_default();
        let _ = fs::remove_file(root.join("calls"));
        let mut calls: Vec<_> = text.lines().map(|line| line.trim().to_owned()).collect();
        calls.sort();
        calls
    }

    #[test]
    fn only_what_changed_is_compiled() {
        let root = kernels();
        let of = |family: &str| {
            [
                "cubin sm_80",
                "cubin sm_90a",
                "ptx compute_80",
                "ptx compute_90a",
            ]
            .map(|call| {
                let (kind, architecture) = call.split_once(' ').unwrap();
                format!("{kind} {family} {architecture}")
            })
        };
        let links = |calls: &[String]| calls.iter().filter(|call| call.starts_with("link")).count();
        let compiled = |calls: &[String]| {
            let compiled = calls.iter().filter(|call| !call.starts_with("link"));
            compiled.cloned().collect::<Vec<_>>()
        };

        let first = calls(root.path());
        let mut both = [of("a"), of("b")].concat();
        both.sort();
        assert_eq!(compiled(&first), both);
        assert_eq!(links(&first), 2);
        assert!(calls(root.path()).is_empty());

        write(root.path(), "kernels/parts/beside.cuh", "// nothing");
        let second = calls(root.path());
        assert_eq!(compiled(&second), of("b"));
        assert_eq!(links(&second), 1);
    }

    #[test]
    fn a_kernel_that_does_not_compile_fails_with_what_nvcc_said() {
        let root = kernels();
        write(root.path(), "kernels/broken.cu", "");
        let families = families(root.path()).unwrap();
        let message = compiler(root.path())
            .fat_binaries(&families, &["80".to_owned()])
            .unwrap_err();
        assert!(
            message.contains("broken.cu(1): error: no such thing"),
            "{message}"
        );
    }

    #[test]
    fn an_nvcc_that_was_named_must_answer() {
        let root = kernels();
        let missing = root.path().join("no/nvcc");
        let find = |variable: &str, value: &Path| {
            Nvcc::find(root.path(), &|name| {
                (name == variable).then(|| value.into())
            })
        };
        let message = find("NVCC", &missing).unwrap_err();
        assert!(message.contains("no/nvcc"), "{message}");
    }
}
