//! The files of a guest: what they are, where they go, and what the guest is told of its machine (ACPI's tables).

use entresol_loader::Region;
use entresol_loader::x86::start;
use entresol_loader::x86::{self, Boot as Loaded};
use entresol_metal_x86::switch::{self, Segment};
use entresol_wire::bundle::{Bundle, FileIndex};
use entresol_wire::config;

use super::{Boot, Memory};
use crate::vm::{BootMemory, BuildError};

/// What of the memory of a machine like `config` its devices reach, if not all: nothing tells a guest of less.
pub const fn window(_config: &config::Vm<FileIndex>) -> Option<Region> {
    None
}

/// The files of a guest, looked at but not yet in its memory.
pub struct Guest {
    loaded: Loaded<'static>,
}

impl Guest {
    /// Looks at what `config` names.
    ///
    /// # Errors
    ///
    /// [`BuildError`]: the field, and what is wrong with the file.
    pub fn recognise(config: &config::Vm<FileIndex>, bundle: &Bundle<'static>) -> Result<Self, BuildError> {
        let data = |index, what: &str| {
            let file = bundle.file(index).map(|file| file.data);
            file.ok_or_else(|| BuildError::because(what, &"the bundle has no such file"))
        };
        let kernel = data(config.kernel, "kernel")?;
        let initrd = config.initrd.map_or(Ok(&[][..]), |index| data(index, "initrd"))?;
        let machine = x86::Machine {
            memory: config.memory,
            vcpus: config.vcpus as u8,
            virtio: u32::MAX,
            cmdline: &config.cmdline,
        };
        let loaded = x86::boot(&machine, kernel, initrd).map_err(|error| BuildError::because("kernel", &error))?;
        Ok(Self { loaded })
    }

    /// Puts everything where it belongs, and says where to start.
    ///
    /// # Errors
    ///
    /// [`BuildError`].
    pub fn place(&self, memory: &Memory) -> Result<Boot, BuildError> {
        let placed = self.loaded.place(&mut BootMemory::new(memory));
        placed.map_err(|error| BuildError::because("memory", &format_args!("{error:?}")))?;
        Ok(boot(&self.loaded.start))
    }
}

/// The vCPU's processor state, as the loader wants it.
fn boot(from: &start::Start) -> Boot {
    let segment = |from: &start::Segment| Segment {
        selector: from.selector,
        attributes: from.attributes,
        limit: from.limit,
        base: from.base,
    };
    let start = switch::Start {
        rip: from.rip,
        rflags: from.rflags,
        cr0: from.cr0,
        cr3: from.cr3,
        cr4: from.cr4,
        efer: from.efer,
        code: segment(&from.code),
        data: segment(&from.data),
        task: segment(&from.task),
        gdt_base: from.gdt.base,
        gdt_limit: from.gdt.limit,
    };
    Boot { start, rbx: from.rbx, rsi: from.rsi }
}
