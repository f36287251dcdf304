//! The few words of CUDA that a preprocessor cannot turn into C++, and the table of source lines.

use std::fmt::Write as _;
use std::path::Path;

const FORM: &str =
    "write kernels as extern \"C\" __global__ void __launch_bounds__(threads) name(parameters)";

/// Turns preprocessed CUDA into C++: shared variables become references into the executor's shared memory, and every
/// kernel is registered by its name. cuda_host.h has put these words in the place of CUDA's.
pub fn kernels_to_cpp(source: &str) -> Result<String, String> {
    let text = replace_each(source, "extern __dtmem_shared__", ';', |_, rest| {
        let (element, name, _, alignment) = declaration(rest)?;
        let alignment = alignment.map_or_else(|| format!("alignof({element})"), str::to_owned);
        Ok(format!(
            "auto* {name} = static_cast<{element}*>(dtmem_host::dynamic_shared({alignment}))"
        ))
    })?;
    let text = replace_each(&text, "__dtmem_shared__", ';', |_, rest| {
        let (element, name, extents, alignment) = declaration(rest)?;
        let alignment = alignment
            .map(|alignment| format!(", {alignment}"))
            .unwrap_or_default();
        Ok(format!(
            "auto& {name} = dtmem_host::shared<{element}{extents}>([] {{}}, \"{name}\"{alignment})"
        ))
    })?;
    let mut kernels = Vec::new();
    let mut text = replace_each(&text, "__dtmem_global__", '{', |before, rest| {
        let (name, bounds, plain) =
            kernel(rest).ok_or_else(|| format!("`{}`: {FORM}", rest.trim()))?;
        if !before.trim_end().ends_with("extern \"C\"") {
            return Err(format!("{name}: {FORM}"));
        }
        kernels.push((name.to_owned(), bounds.to_owned()));
        Ok(plain)
    })?;
    for (name, bounds) in kernels {
        let _ = writeln!(
            text,
            "static const dtmem_host::Registration dtmem_registration_{name}(\"{name}\", &{name}, {bounds});"
        );
    }
    Ok(text)
}

/// Replaces `word`, and what follows it up to `end`, by what `replacement` makes of the text before and the text that
/// follows. Line breaks are kept, so that lines keep their numbers.
fn replace_each(
    source: &str,
    word: &str,
    end: char,
    mut replacement: impl FnMut(&str, &str) -> Result<String, String>,
) -> Result<String, String> {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find(word) {
        text.push_str(&rest[..at]);
        let after = &rest[at + word.len()..];
        let length = after
            .find(end)
            .ok_or_else(|| format!("`{end}` expected after {word}"))?;
        let (inside, tail) = after.split_at(length);
        let new = replacement(&text, inside)?;
        let breaks = |text: &str| text.matches('\n').count();
        let lost = breaks(inside).saturating_sub(breaks(&new));
        text.push_str(&new);
        text.extend(std::iter::repeat_n('\n', lost));
        rest = tail;
    }
    text.push_str(rest);
    Ok(text)
}

/// `alignas(16) float tile[2][8]` → element, name, extents, alignment.
fn declaration(text: &str) -> Result<(&str, &str, &str, Option<&str>), String> {
    let mut text = text.trim();
    let mut alignment = None;
    if let Some((inside, rest)) = text.strip_prefix("alignas").and_then(parenthesised) {
        alignment = Some(inside);
        text = rest.trim();
    }
    let (head, extents) = text.split_at(text.find('[').unwrap_or(text.len()));
    let head = head.trim_end();
    let start = head
        .rfind(|c: char| !(c.is_alphanumeric() || c == '_'))
        .map_or(0, |at| at + 1);
    let (element, name) = head.split_at(start);
    if element.trim().is_empty() || name.is_empty() || text.contains('=') || extents.contains(',') {
        return Err(format!(
            "__shared__ {text}: write one variable per declaration, without a value"
        ));
    }
    Ok((element.trim(), name, extents, alignment))
}

/// ` void __dtmem_bounds__(…) name(…)` → name, bounds, and the text without the bounds.
fn kernel(text: &str) -> Option<(&str, &str, String)> {
    let (before, after) = text.split_once("__dtmem_bounds__")?;
    let (bounds, rest) = parenthesised(after)?;
    let name = rest.split_once('(')?.0.trim();
    (before.trim() == "void").then(|| (name, bounds, format!("{before}{rest}")))
}

/// `(inside) rest` → (inside, rest)
fn parenthesised(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_start();
    let mut depth = 0;
    for (at, character) in text.char_indices() {
        match character {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return (at > 0).then(|| (&text[1..at], &text[at + 1..]));
        }
    }
    None
}

/// Adds to GCC's assembly, after every call, an entry of the section `dtmem_lines`: the return address, the file
/// (relative to `kernels`' parent), the line and the column. So a check knows where it was called from without debugging
/// information, which a release build strips.
/// Calls in what stands in for CUDA's headers count as the kernel's.
pub fn with_line_table(assembly: &str, kernels: &Path) -> String {
    let is_kernel = |path: &Path| {
        let of_executor = ["kernels/host/include", "kernels/host/runtime"];
        path.starts_with("kernels") && !of_executor.iter().any(|folder| path.starts_with(folder))
    };
    let root = kernels.parent().unwrap_or(kernels);
    let mut text = String::with_capacity(assembly.len() * 2);
    let mut files = Vec::new();
    let mut location = None;
    let mut calls = 0;
    for line in assembly.lines() {
        text.push_str(line);
        text.push('\n');
        let mut words = line.split_whitespace();
        match words.next() {
            Some(".file") => {
                let number = words.next().and_then(|word| word.parse::<usize>().ok());
                let names: Vec<_> = line.split('"').skip(1).step_by(2).collect();
                if let Some(number) = number {
                    let path: std::path::PathBuf = names.iter().collect();
                    let path = path
                        .strip_prefix(root)
                        .map(Path::to_path_buf)
                        .unwrap_or(path);
                    files.push((number, path));
                }
            }
            Some(".loc") => {
                let mut number = || words.next().and_then(|word| word.parse::<usize>().ok());
                if let (Some(file), Some(line), Some(column)) = (number(), number(), number())
                    && files
                        .iter()
                        .any(|(number, path)| *number == file && is_kernel(path))
                {
                    location = Some((file, line, column));
                }
            }
            Some("call" | "bl") => {
                if let Some((file, line, column)) = location {
                    calls += 1;
                    // "?": in the group of the function, so that the linker drops or keeps both; "R": not before.
                    let _ = write!(
                        text,
                        ".Ldtmem_call{calls}:\n\
                         \t.pushsection dtmem_lines,\"aR?\",@progbits\n\
                         \t.balign 4\n\
                         \t.long .Ldtmem_call{calls}-., .Ldtmem_file{file}-., {line}, {column}\n\
                         \t.popsection\n"
                    );
                }
            }
            _ => {}
        }
    }
    text.push_str("\t.section .rodata.dtmem_files,\"a\",@progbits\n");
    for (number, path) in files {
        let _ = writeln!(text, ".Ldtmem_file{number}:\n\t.string {path:?}");
    }
    text
}
