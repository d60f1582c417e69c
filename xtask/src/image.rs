//! The hypervisor's program, built and laid out as the raw `Image` that the arm64 Linux boot protocol starts.
//!
//! The linker writes an ELF file; QEMU's `-kernel` and U-Boot's `booti` start a flat file with a 64-byte header (kernel
//! documentation, "Booting AArch64 Linux"). [`flatten`] lays the loadable segments out by physical address; what a
//! segment has in memory but not in the file (the zeroed part at the end) is in the header's `image_size` already.
//!
//! EDK2 starts the same file as an EFI application: its PE header describes what `flatten` made, which
//! [`check_application`] compares.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use object::read::elf::{ElfFile64, ProgramHeader};
use object::read::pe::PeFile64;
use object::{LittleEndian, Object, elf, pe};

use crate::fetch::toolchain::{self, METAL_TARGET, METAL_X86_TARGET};
use crate::progress::Step;
use crate::workspace;

/// Longest image that we believe: a bad address must not make a file of terabytes.
const MAX_IMAGE: u64 = 256 << 20;
/// Where the header's magic is, and what it is.
const MAGIC: (usize, &[u8]) = (56, b"ARM\x64");

/// A built hypervisor.
#[derive(Clone, Debug)]
pub struct Image {
    /// With symbols: what backtraces are resolved against.
    pub elf: PathBuf,
    /// What a boot loader starts.
    pub raw: PathBuf,
}

/// Flags of everything that is compiled for the metal: position independent (the image runs where it was loaded), frame
/// pointers for backtraces, LSE atomics (Arm DDI 0487, FEAT_LSE: on every machine with EL2 that we run on).
pub fn rustflags() -> Vec<String> {
    let script = workspace::root().join("metal/arm64/link.ld");
    let mut flags = Vec::new();
    for codegen in ["relocation-model=pie", "force-frame-pointers=yes", "target-feature=+lse"] {
        flags.extend(["-C".to_owned(), codegen.to_owned()]);
    }
    let script = format!("-T{}", script.display());
    for argument in ["-pie", "--no-dynamic-linker", "-ztext", "-zmax-page-size=4096", script.as_str()] {
        flags.extend(["-C".to_owned(), format!("link-arg={argument}")]);
    }
    flags
}

/// Cargo with the metal's target and flags, for `build` and `clippy` alike.
pub fn cargo(subcommand: &str) -> std::process::Command {
    let mut cargo = workspace::cargo();
    cargo.args([subcommand, "--target", METAL_TARGET, "--package", "entresol-hypervisor"]);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", rustflags().join("\x1f")).env_remove("RUSTFLAGS");
    cargo
}

/// Builds the hypervisor; `features` are its crate's.
///
/// # Errors
/// When it does not compile or its ELF is not what the boot protocol needs.
pub fn build(features: &[&str]) -> Result<Image> {
    toolchain::ensure_targets(&[METAL_TARGET])?;
    let step = Step::start("building the hypervisor");
    let mut build = cargo("build");
    build.args(["--profile", "metal", "--quiet"]);
    if !features.is_empty() {
        build.args(["--features", &features.join(",")]);
    }
    workspace::output(&mut build)?;
    drop(step);
    let elf = workspace::target_dir().join(METAL_TARGET).join("metal/entresol-hypervisor");
    let bytes = fs::read(&elf).with_context(|| format!("cannot read {}", elf.display()))?;
    let image = flatten(&bytes).with_context(|| format!("cannot make an image of {}", elf.display()))?;
    ensure!(
        image.get(MAGIC.0..MAGIC.0 + 4) == Some(MAGIC.1),
        "{} does not start with an arm64 Image header",
        elf.display()
    );
    check_application(&image).with_context(|| format!("no EFI firmware starts an image of {}", elf.display()))?;
    let raw = workspace::output_dir()?.join("hypervisor.img");
    write_new(&raw, &image)?;
    Ok(Image { elf, raw })
}

/// Flags of what is compiled for the bare x86-64 machine: linked where a PVH loader puts it, frame pointers for backtraces, BMI1 and
/// BMI2, which the start code asks for.
pub fn rustflags_x86() -> Vec<String> {
    let script = workspace::root().join("metal/x86/link.ld");
    let mut flags = Vec::new();
    for codegen in ["relocation-model=static", "force-frame-pointers=yes", "target-feature=+bmi1,+bmi2"] {
        flags.extend(["-C".to_owned(), codegen.to_owned()]);
    }
    for argument in ["-zmax-page-size=4096".to_owned(), format!("-T{}", script.display())] {
        flags.extend(["-C".to_owned(), format!("link-arg={argument}")]);
    }
    flags
}

/// Cargo with the bare x86-64 machine's target and flags, for `build` and `clippy` alike.
pub fn cargo_x86(subcommand: &str) -> std::process::Command {
    let mut cargo = workspace::cargo();
    cargo.args([subcommand, "--target", METAL_X86_TARGET, "--package", "entresol-hypervisor"]);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", rustflags_x86().join("\x1f")).env_remove("RUSTFLAGS");
    cargo
}

/// Builds the hypervisor for x86-64: an ELF file that a PVH loader starts.
///
/// # Errors
/// When it does not compile.
pub fn build_x86() -> Result<PathBuf> {
    toolchain::ensure_targets(&[METAL_X86_TARGET])?;
    let _step = Step::start("building the hypervisor for x86-64");
    workspace::output(cargo_x86("build").args(["--profile", "metal", "--quiet"]))?;
    Ok(workspace::target_dir().join(METAL_X86_TARGET).join("metal/entresol-hypervisor"))
}

/// Writes a file under its name only when it is whole: a machine that reads the old one goes on reading it.
///
/// # Errors
/// When it cannot be written.
pub fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    let dir = path.parent().context("a path without a folder")?;
    let mut file =
        tempfile::NamedTempFile::new_in(dir).with_context(|| format!("cannot write in {}", dir.display()))?;
    std::io::Write::write_all(&mut file, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    file.persist(path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

/// An ELF file's loadable segments, laid out by physical address from the lowest.
///
/// # Errors
/// When it is not a 64-bit little-endian ELF file, has no segment, or its segments overlap or spread too far.
pub fn flatten(elf: &[u8]) -> Result<Vec<u8>> {
    let file = ElfFile64::<LittleEndian>::parse(elf).context("not a 64-bit little-endian ELF file")?;
    let endian = LittleEndian;
    let mut segments = Vec::new();
    for header in file.elf_program_headers() {
        if header.p_type(endian) == elf::PT_LOAD && header.p_filesz(endian) > 0 {
            let data = header.data(endian, elf).ok().context("a segment lies outside the file")?;
            segments.push((header.p_paddr(endian), data));
        }
    }
    segments.sort_by_key(|(address, _)| *address);
    let &(base, _) = segments.first().context("no segment is loaded")?;
    let mut image: Vec<u8> = Vec::new();
    for (address, data) in segments {
        let offset = address - base;
        ensure!(offset >= image.len() as u64, "the segment at {address:#x} overlaps the one before");
        ensure!(
            offset + (data.len() as u64) < MAX_IMAGE,
            "the segment at {address:#x} is far from the first at {base:#x}"
        );
        image.resize(offset as usize, 0);
        image.extend_from_slice(data);
    }
    ensure!(file.entry() == base, "the program starts at {:#x}, not at its first byte {base:#x}", file.entry());
    Ok(image)
}

/// Whether a flat image is an EFI application that strict firmware starts: each section lies in the file where it lies in
/// memory, none is both writable and executable, and the entry is in one that is executable.
///
/// # Errors
/// The first rule that is broken.
pub fn check_application(image: &[u8]) -> Result<()> {
    let file = PeFile64::parse(image).context("not a PE32+ file")?;
    let entry = file.entry().wrapping_sub(file.relative_address_base());
    let mut entered = false;
    for section in file.section_table().iter() {
        let word = |field: object::U32<LittleEndian>| u64::from(field.get(LittleEndian));
        let (address, size) = (word(section.virtual_address), word(section.virtual_size));
        let (offset, in_file) = (word(section.pointer_to_raw_data), word(section.size_of_raw_data));
        let name = String::from_utf8_lossy(section.raw_name()).into_owned();
        ensure!(offset == address, "section {name} lies at {offset:#x} in the file and at {address:#x} in memory");
        ensure!(
            in_file <= size && offset + in_file <= image.len() as u64,
            "section {name} has {in_file:#x} bytes in a file of {:#x}",
            image.len()
        );
        let flags = section.characteristics.get(LittleEndian);
        let executable = flags & pe::IMAGE_SCN_MEM_EXECUTE != 0;
        ensure!(
            !(executable && flags & pe::IMAGE_SCN_MEM_WRITE != 0),
            "section {name} is both writable and executable"
        );
        entered |= executable && (address..address + in_file).contains(&entry);
    }
    ensure!(entered, "the entry {entry:#x} is in no executable section");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: u32 = pe::IMAGE_SCN_MEM_EXECUTE;
    const DATA: u32 = pe::IMAGE_SCN_MEM_WRITE;

    /// A PE32+ file of 0x600 bytes: each section is (address, file offset, bytes in the file, flags).
    fn application_of(sections: &[(u32, u32, u32, u32)], entry: u32) -> Vec<u8> {
        let mut file = b"MZ".to_vec();
        file.resize(60, 0);
        file.extend_from_slice(&64u32.to_le_bytes());
        file.extend_from_slice(b"PE\0\0");
        file.extend_from_slice(&pe::IMAGE_FILE_MACHINE_ARM64.to_le_bytes());
        file.extend_from_slice(&(sections.len() as u16).to_le_bytes());
        file.extend_from_slice(&[0; 12]);
        file.extend_from_slice(&112u16.to_le_bytes());
        file.extend_from_slice(&pe::IMAGE_FILE_EXECUTABLE_IMAGE.to_le_bytes());
        let mut optional = [0; 112];
        optional[..2].copy_from_slice(&pe::IMAGE_NT_OPTIONAL_HDR64_MAGIC.to_le_bytes());
        optional[16..20].copy_from_slice(&entry.to_le_bytes());
        file.extend_from_slice(&optional);
        for (address, offset, in_file, flags) in sections {
            file.extend_from_slice(b".section");
            for word in [0x400, *address, *in_file, *offset, 0, 0, 0, *flags] {
                file.extend_from_slice(&word.to_le_bytes());
            }
        }
        file.resize(0x600, 0);
        file
    }

    #[test]
    fn an_application_that_firmware_would_not_start_is_refused() {
        let good = [(0x200, 0x200, 0x200, TEXT), (0x400, 0x400, 0x200, DATA)];
        check_application(&application_of(&good, 0x200)).unwrap();
        let refused =
            |section, entry| check_application(&application_of(&[good[0], section], entry)).unwrap_err().to_string();
        assert!(refused(good[1], 0x400).contains("in no executable section"));
        assert!(refused((0x400, 0x200, 0x200, DATA), 0x200).contains("0x200 in the file and at 0x400 in memory"));
        assert!(refused((0x400, 0x400, 0x400, DATA), 0x200).contains("0x400 bytes in a file of 0x600"));
        assert!(refused((0x400, 0x400, 0x200, TEXT | DATA), 0x200).contains("both writable and executable"));
        assert!(check_application(b"ARM\x64").unwrap_err().to_string().contains("not a PE32+ file"));
    }

    /// A minimal ELF file: each segment is (physical address, bytes); the entry is the first's address.
    fn elf_of(segments: &[(u64, &[u8])], entry: u64) -> Vec<u8> {
        let mut file = Vec::new();
        file.extend_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        for half in [2u16, 183] {
            file.extend_from_slice(&half.to_le_bytes());
        }
        file.extend_from_slice(&1u32.to_le_bytes());
        for word in [entry, 64, 0] {
            file.extend_from_slice(&word.to_le_bytes());
        }
        file.extend_from_slice(&0u32.to_le_bytes());
        for half in [64u16, 56, segments.len() as u16, 64, 0, 0] {
            file.extend_from_slice(&half.to_le_bytes());
        }
        let mut offset = 64 + 56 * segments.len() as u64;
        for (address, data) in segments {
            file.extend_from_slice(&1u32.to_le_bytes());
            file.extend_from_slice(&5u32.to_le_bytes());
            for word in [offset, *address, *address, data.len() as u64, data.len() as u64 + 8, 1] {
                file.extend_from_slice(&word.to_le_bytes());
            }
            offset += data.len() as u64;
        }
        segments.iter().for_each(|(_, data)| file.extend_from_slice(data));
        file
    }

    #[test]
    fn segments_lie_at_their_addresses_whatever_their_order() {
        let elf = elf_of(&[(0x108, b"later"), (0x100, b"first")], 0x100);
        assert_eq!(flatten(&elf).unwrap(), b"first\0\0\0later");
    }

    #[test]
    fn what_no_loader_could_start_is_refused() {
        let refused = |elf: &[u8]| flatten(elf).unwrap_err().to_string();
        assert!(refused(b"not an ELF file").contains("not a 64-bit"));
        assert!(refused(&elf_of(&[], 0)).contains("no segment"));
        assert!(refused(&elf_of(&[(0, b"abcd"), (2, b"x")], 0)).contains("overlaps"));
        assert!(refused(&elf_of(&[(0, b"abcd"), (1 << 40, b"x")], 0)).contains("far from"));
        assert!(refused(&elf_of(&[(0, b"abcd")], 2)).contains("starts at 0x2"));
    }

    #[test]
    fn a_cut_off_file_is_an_error_at_every_length() {
        let elf = elf_of(&[(0, b"abcd")], 0);
        for end in 0..elf.len() {
            assert!(flatten(&elf[..end]).is_err(), "{end} bytes were taken");
        }
    }
}
