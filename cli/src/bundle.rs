//! From a checked configuration to the boot bundle's file.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use entresol_wire::Refusal;
use entresol_wire::bundle::{Builder, FileIndex, Packed};
use entresol_wire::config::format_size;

use crate::config::{ConfigError, Loaded};

/// Where QEMU puts an initrd, in bytes above the start of memory, in machines of the sizes that a configuration allows.
const INITRD_OFFSET: u64 = 128 << 20;
/// Bytes written between two reports of progress.
const STEP: usize = 1 << 20;

/// Packs a configuration with its files. Files that guests only read are stored once; each disk that a guest may write to
/// has its own copy.
///
/// # Errors
/// The bundle would not fit into the outer machine.
pub fn pack(loaded: &Loaded) -> Result<Packed<'_>, ConfigError> {
    let mut builder = Builder::new();
    let mut shared: Vec<(&Path, FileIndex)> = Vec::new();
    let config = loaded.config().clone().map_files(|role, name| {
        let missing = || loaded.refused(Refusal::text(role.to_string(), &name, "must be a file that can be read"));
        let (path, contents) = loaded.file(&name).ok_or_else(missing)?;
        if let Some((_, index)) = shared.iter().find(|(known, _)| *known == path && !role.writable()) {
            return Ok(*index);
        }
        let label = path.file_name().unwrap_or_default().to_string_lossy();
        let index = builder.add(label, contents, role.writable())?;
        if !role.writable() {
            shared.push((path, index));
        }
        Ok::<_, ConfigError>(index)
    })?;
    let packed = builder.pack(&config)?;
    let (total, memory) = (packed.total(), config.outer.memory);
    if total > memory - INITRD_OFFSET {
        let rule = format!("must hold the boot bundle ({total} bytes) above its first {}", format_size(INITRD_OFFSET));
        return Err(loaded.refused(Refusal::new("outer.memory", format_size(memory), rule)));
    }
    Ok(packed)
}

/// Packs and writes the bundle to `output`, which appears or changes only when it is complete. `progress` is told the
/// bytes written so far and in all.
///
/// # Errors
/// What [`pack`] refuses; `output` is one of the files to be packed, or cannot be written.
pub fn write(loaded: &Loaded, output: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<u64, ConfigError> {
    let failed = |error| ConfigError::Write { path: output.to_owned(), error };
    if let Some(role) = overwritten(loaded, output) {
        return Err(failed(io::Error::other(format!("it is {role}, which the bundle is made of"))));
    }
    let packed = pack(loaded)?;
    let folder = match output.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let mut file = tempfile::Builder::new().prefix(".entresol-bundle").tempfile_in(folder).map_err(failed)?;
    let mut written = 0;
    for part in packed.pieces().flat_map(|piece| piece.chunks(STEP)) {
        file.write_all(part).map_err(failed)?;
        written += part.len() as u64;
        progress(written, packed.total());
    }
    file.persist(output).map_err(|error| failed(error.error))?;
    Ok(packed.total())
}

/// The role of the input that `output` would replace.
fn overwritten(loaded: &Loaded, output: &Path) -> Option<String> {
    let target: PathBuf = output.canonicalize().ok()?;
    if loaded.path().canonicalize().is_ok_and(|config| config == target) {
        return Some("the configuration".into());
    }
    let same = |name: &String| loaded.file(name).is_some_and(|(path, _)| path == target);
    loaded.config().files().find(|(_, name)| same(name)).map(|(role, _)| role.to_string())
}
