//! The slots that a virtual machine starts with: its memory, its flash, its read-only files.
//!
//! Everything that may be wrong with an address was refused with the configuration; what is left is told with the field.

use alloc::string::{String, ToString};

use entresol_addr::Gpa;
use entresol_arch_arm64::stage2::Stage2;
use entresol_backing::ObjectHandle;
use entresol_loader::virt;
use entresol_metal_arm64::{Metal, cpu};
use entresol_slot::{ObjectId, SlotFlags, SlotRequest};
use entresol_wire::bundle::{Bundle, FileIndex};
use entresol_wire::config::{self, KernelFormat};

use super::{Media, rom};

/// Its memory's number.
const RAM: u32 = 0;
/// Its flash's, while that reads as memory.
pub const FLASH: u32 = 1;
/// That of the first of its read-only files: firmware, if it has some.
const ROMS: u32 = 2;

/// That of the records of stolen time.
pub const RECORDS: u32 = ALIASES - 1;

/// The first that shows memory a second time; the last ones are devices of the machine.
pub const ALIASES: u32 = 16;

const _: () = assert!(ROMS as usize + 1 + config::MAX_ROMS <= RECORDS as usize);
// What the configuration was checked with is where things are.
const _: () = assert!(config::FIRMWARE_BASE == virt::FIRMWARE_BASE && config::FLASH_BASE == virt::FLASH_BASE);
const _: () = assert!(config::ROM_END == virt::GICD_BASE);

/// Makes them in `memory`, which has none.
///
/// # Errors
///
/// The field, and what is wrong. Some slots may be there then.
pub fn create(
    memory: &entresol_mmu::Vm<'static, Metal, Stage2>,
    config: &config::Vm<FileIndex>,
    bundle: &Bundle<'static>,
    ram: ObjectHandle,
    media: &Media,
) -> Result<(), String> {
    let set = |field: &str, request: SlotRequest| {
        memory.set_slot(cpu::index(), &request).map_err(|error| alloc::format!("{field}: {error}"))
    };
    let base = Gpa::new(virt::RAM_BASE);
    let object = ObjectId::new(ram.raw());
    set("memory", SlotRequest { id: RAM, base, size: config.memory, object, offset: 0, flags: 0 })?;
    if let Some(flash) = &media.flash {
        set("flash", flash.slot())?;
    }
    let firmware = (config.kernel_format == KernelFormat::Firmware).then_some((virt::FIRMWARE_BASE, config.kernel));
    let files = firmware.into_iter().chain(config.roms.iter().map(|rom| (rom.at, rom.file)));
    for (id, (base, file)) in (ROMS..).zip(files) {
        let field = if base == virt::FIRMWARE_BASE && firmware.is_some() {
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
