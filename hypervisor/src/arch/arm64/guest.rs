//! The files of a guest: what they are, where they go, and what the guest is told of its machine (a device tree).

use entresol_addr::Gpa;
use entresol_loader::kernel::{self, Hint};
use entresol_loader::layout::{self, Layout, LayoutError};
use entresol_loader::window::Window;
use entresol_loader::{Memory as _, Ram, Region, fdt, virt};
use entresol_wire::bundle::{Bundle, FileIndex};
use entresol_wire::config::{self, KernelFormat, PrivateIo};

use super::{Boot, Memory, map};
use crate::entropy;
use crate::vm::{BootMemory, BuildError};

/// What of the memory of a machine like `config` its devices reach, if not all.
pub fn window(config: &config::Vm<FileIndex>) -> Option<Region> {
    reach(config).map(|window| window.region)
}

fn reach(config: &config::Vm<FileIndex>) -> Option<Window> {
    (config.private_io == PrivateIo::Bounce).then(|| Window::of(ram(config)))
}

fn ram(config: &config::Vm<FileIndex>) -> Ram {
    Ram { base: map::RAM, size: config.memory }
}

/// The files of a guest, looked at but not yet in its memory.
pub struct Guest<'b> {
    config: &'b config::Vm<FileIndex>,
    /// `None`: firmware, which is not put into memory.
    kernel: Option<kernel::Kernel>,
    file: &'static [u8],
    initrd: &'static [u8],
    flash: Option<u64>,
}

impl<'b> Guest<'b> {
    /// Looks at what `config` names.
    ///
    /// # Errors
    ///
    /// [`BuildError`]: the field, and what is wrong with the file.
    pub fn recognise(config: &'b config::Vm<FileIndex>, bundle: &Bundle<'static>) -> Result<Self, BuildError> {
        let data = |index, what: &str| {
            let file = bundle.file(index).map(|file| file.data);
            file.ok_or_else(|| BuildError::because(what, &"the bundle has no such file"))
        };
        let file = data(config.kernel, "kernel")?;
        let initrd = config.initrd.map_or(Ok(&[][..]), |index| data(index, "initrd"))?;
        let flash = config.flash.map(|index| data(index, "flash")).transpose()?.map(|image| image.len() as u64);
        let hint = match config.kernel_format {
            KernelFormat::Auto => Some(Hint::Auto),
            KernelFormat::Flat => Some(Hint::Flat),
            KernelFormat::Firmware => None,
        };
        let recognise = |hint| kernel::recognise(file, hint).map_err(|error| BuildError::because("kernel", &error));
        Ok(Self { config, kernel: hint.map(recognise).transpose()?, file, initrd, flash })
    }

    /// Where everything goes, for a tree of `size` bytes.
    fn layout(&self, ram: Ram, size: u64) -> Result<Layout, LayoutError> {
        match &self.kernel {
            Some(kernel) => layout::layout(ram, kernel, self.initrd.len() as u64, size),
            None => {
                let code = Region { start: Gpa::new(virt::FIRMWARE_BASE), size: self.file.len() as u64 };
                layout::firmware(ram, code, size)
            }
        }
    }

    /// Puts everything where it belongs, and says where to start.
    ///
    /// # Errors
    ///
    /// [`BuildError`].
    pub fn place(&self, memory: &Memory) -> Result<Boot, BuildError> {
        let (ram, window) = (ram(self.config), reach(self.config));
        let seeds = entropy::seeds();
        let mut machine = fdt::Machine {
            ram,
            vcpus: self.config.vcpus as u8,
            cmdline: &self.config.cmdline,
            initrd: (!self.initrd.is_empty()).then_some(Region { start: ram.base, size: self.initrd.len() as u64 }),
            virtio: u32::MAX,
            window,
            flash: self.flash,
            rng_seed: seeds.map(|(seed, _)| seed),
            kaslr_seed: seeds.map(|(_, seed)| seed),
        };
        let size = fdt::generate(&machine).map_err(|error| BuildError::because("device tree", &error))?.len() as u64;
        let layout = self
            .layout(window.map_or(ram, |window| window.below(ram)), size)
            .map_err(|error| BuildError::because("memory", &error))?;
        machine.initrd = layout.initrd;
        let tree = fdt::generate(&machine).map_err(|error| BuildError::because("device tree", &error))?;
        let mut boot = BootMemory::new(memory);
        if let Some(kernel) = &self.kernel {
            kernel::place(kernel, self.file, &layout, &mut boot)
                .map_err(|error| BuildError::because("kernel", &format_args!("{error:?}")))?;
        }
        let put = |boot: &mut BootMemory<'_>, at: Region, bytes: &[u8]| {
            boot.write(at.start, bytes).map_err(|error| BuildError::because("memory", &format_args!("{error:?}")))
        };
        if let Some(initrd) = layout.initrd {
            put(&mut boot, initrd, self.initrd)?;
        }
        put(&mut boot, layout.dtb, &tree)?;
        if let Some(copy) = layout.dtb_at_base {
            put(&mut boot, copy, &tree)?;
        }
        Ok(Boot { entry: layout.entry.get(), argument: layout.dtb.start.get() })
    }
}
