//! The slots that a virtual machine starts with: its memory, its flash, its read-only files.
//!
//! Everything that may be wrong with an address was refused with the configuration; what is left is told with the field.

use alloc::string::{String, ToString};

use entresol_addr::{Gpa, PAGE_SIZE};
use entresol_backing::ObjectHandle;
use entresol_slot::{ObjectId, SlotFlags, SlotRequest};
use entresol_wire::bundle::{Bundle, FileIndex};
use entresol_wire::config::{self, KernelFormat};

use super::{Media, rom};
use crate::arch::{Memory, cpu, map};

/// Its flash's number, while that reads as memory: behind those of its memory.
pub const FLASH: u32 = map::RAM_SLOTS;
/// That of the first of its read-only files: firmware, if it has some.
const ROMS: u32 = FLASH + 1;

/// That of the records of stolen time.
pub const RECORDS: u32 = ALIASES - 1;

/// The first that shows memory a second time; the last ones are devices of the machine.
pub const ALIASES: u32 = 16;

const _: () = assert!(ROMS as usize + 1 + config::MAX_ROMS <= RECORDS as usize);

/// Makes them in `memory`, which has none.
///
/// # Errors
///
/// The field, and what is wrong. Some slots may be there then.
pub fn create(
    memory: &Memory,
    config: &config::Vm<FileIndex>,
    bundle: &Bundle<'static>,
    ram: ObjectHandle,
    media: &Media,
) -> Result<(), String> {
    let set = |field: &str, request: SlotRequest| {
        memory.set_slot(cpu::index(), &request).map_err(|error| alloc::format!("{field}: {error}"))
    };
    let object = ObjectId::new(ram.raw());
    for (id, (offset, frames)) in (0..).zip(map::parts(config.memory)) {
        let (base, size) = (frames.start().base(), frames.count() * PAGE_SIZE);
        set("memory", SlotRequest { id, base, size, object, offset, flags: 0 })?;
    }
    if let Some(flash) = &media.flash {
        set("flash", flash.slot())?;
    }
    let firmware = (config.kernel_format == KernelFormat::Firmware).then_some((map::FIRMWARE_BASE, config.kernel));
    let files = firmware.into_iter().chain(config.roms.iter().map(|rom| (rom.at, rom.file)));
    for (id, (base, file)) in (ROMS..).zip(files) {
        let field = if base == map::FIRMWARE_BASE && firmware.is_some() {
            "kernel".to_string()
        } else {
            alloc::format!("roms at {base:#x}")
        };
        let rom = rom::find(bundle, file).map_err(|reason| alloc::format!("{field}: {reason}"))?;
        let (object, flags) = (ObjectId::new(rom.object.raw()), SlotFlags::READ_ONLY.bits());
        set(&field, SlotRequest { id, base: Gpa::new(base), size: rom.size, object, offset: 0, flags })?;
    }
    Ok(())
}
