//! The virtual machine and its one vCPU.

use std::error::Error;
use std::io;
use std::mem::offset_of;

use kvm_bindings::{
    KVM_ARM_IRQ_TYPE_SHIFT, KVM_ARM_IRQ_TYPE_SPI, KVM_ARM_VCPU_PSCI_0_2, KVM_DEV_ARM_VGIC_CTRL_INIT,
    KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_REG_ARM_CORE, KVM_REG_ARM64, KVM_REG_SIZE_U64,
    KVM_SYSTEM_EVENT_SHUTDOWN, KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, kvm_regs, kvm_userspace_memory_region, kvm_vcpu_init,
    user_pt_regs,
};
use kvm_ioctls::{DeviceFd, IoEventAddress, Kvm, NoDatamatch, VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::Devices;
use crate::load::Start;
use crate::memory::Memory;
use crate::{RAM, SERVICE};

/// The first slot holds what a flat guest runs from; the rest can lose its entries without it.
const FIRST_SLOT: u64 = 32 << 20;
const DISTRIBUTOR: u64 = 0x0800_0000;
const REDISTRIBUTORS: u64 = 0x080a_0000;
/// The UART's interrupt on `virt`: SPI 1.
const UART_INTERRUPT: u32 = 33;

/// Where the guest expects a page of coalesced MMIO, and a doorbell.
const COALESCED: u64 = 0x0c00_0000;
const DOORBELL: u64 = 0x0c00_1000;

/// A virtual machine that can run once.
pub struct Vm {
    vcpu: VcpuFd,
    vm: VmFd,
    /// What the doorbell signals; nobody waits for it.
    _doorbell: EventFd,
    _interrupts: DeviceFd,
    memory: Memory,
    uart_line: bool,
    /// What was stored to the service's first register.
    range_start: u64,
}

impl Vm {
    /// One vCPU, the kernel's interrupt controller, `memory` in two slots.
    pub fn new(memory: Memory) -> Result<Self, Box<dyn Error>> {
        let vm = Kvm::new()?.create_vm()?;
        let mut vcpu = vm.create_vcpu(0)?;
        let mut target = kvm_vcpu_init::default();
        vm.get_preferred_target(&mut target)?;
        target.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
        vcpu.vcpu_init(&target)?;
        let interrupts = interrupt_controller(&vm)?;
        vcpu.map_coalesced_mmio_ring()?;
        vm.register_coalesced_mmio(IoEventAddress::Mmio(COALESCED), 0x1000)?;
        let doorbell = EventFd::new(libc::EFD_NONBLOCK)?;
        vm.register_ioevent(&doorbell, &IoEventAddress::Mmio(DOORBELL), NoDatamatch)?;
        let vm =
            Self { vcpu, vm, _doorbell: doorbell, _interrupts: interrupts, memory, uart_line: false, range_start: 0 };
        vm.slot(0, 0, FIRST_SLOT.min(vm.memory.size()))?;
        vm.slot(1, FIRST_SLOT, vm.memory.size().saturating_sub(FIRST_SLOT))?;
        Ok(vm)
    }

    /// Runs until the guest powers off.
    pub fn run(&mut self, start: Start, devices: &mut Devices) -> Result<(), Box<dyn Error>> {
        self.set_register(offset_of!(kvm_regs, regs) + offset_of!(user_pt_regs, pc), start.entry)?;
        self.set_register(offset_of!(kvm_regs, regs) + offset_of!(user_pt_regs, regs), start.device_tree)?;
        loop {
            let mut drop_range = None;
            match self.vcpu.run() {
                Ok(VcpuExit::MmioRead(address, data)) => devices.read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    if address == SERVICE + 16 {
                        while self.vcpu.coalesced_mmio_read()?.is_some() {}
                    } else if address & !0xf == SERVICE {
                        drop_range = Some((address & 8 != 0, data.try_into().map(u64::from_le_bytes)?));
                    } else {
                        devices.write(address, data);
                    }
                }
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => return Ok(()),
                Ok(VcpuExit::Intr) => {}
                Ok(other) => return Err(format!("the guest left with {other:?}").into()),
                Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {}
                Err(error) => return Err(error.into()),
            }
            if let Some((is_length, value)) = drop_range {
                self.service(is_length, value)?;
            }
            self.follow_line(devices.interrupt())?;
        }
    }

    /// Deleting a slot drops its second-stage entries; the memory behind it stays.
    fn service(&mut self, is_length: bool, value: u64) -> Result<(), Box<dyn Error>> {
        if !is_length {
            self.range_start = value;
            return Ok(());
        }
        let end = self.range_start.checked_add(value);
        if self.range_start < RAM + FIRST_SLOT || end.is_none_or(|end| end > RAM + self.memory.size()) {
            return Err(format!("the guest named {value:#x} bytes at {:#x}", self.range_start).into());
        }
        self.slot(1, FIRST_SLOT, 0)?;
        self.slot(1, FIRST_SLOT, self.memory.size() - FIRST_SLOT)?;
        Ok(())
    }

    fn slot(&self, slot: u32, offset: u64, size: u64) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: RAM + offset,
            memory_size: size,
            userspace_addr: self.memory.host_address() + offset,
        };
        // SAFETY: inside the mapping, which lives as long as this; nothing of the process is in it but the guest's bytes,
        // to which no reference is kept.
        unsafe { self.vm.set_user_memory_region(region) }
    }

    fn set_register(&self, offset: usize, value: u64) -> Result<(), kvm_ioctls::Error> {
        let id = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | u64::from(KVM_REG_ARM_CORE) | (offset as u64 / 4);
        self.vcpu.set_one_reg(id, &value.to_le_bytes()).map(drop)
    }

    fn follow_line(&mut self, high: bool) -> io::Result<()> {
        if high != self.uart_line {
            self.uart_line = high;
            self.vm
                .set_irq_line(KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT | UART_INTERRUPT, high)
                .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        }
        Ok(())
    }
}

fn interrupt_controller(vm: &VmFd) -> Result<DeviceFd, kvm_ioctls::Error> {
    let mut device =
        kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, ..kvm_create_device::default() };
    let controller = vm.create_device(&mut device)?;
    for (kind, address) in [(KVM_VGIC_V3_ADDR_TYPE_DIST, &DISTRIBUTOR), (KVM_VGIC_V3_ADDR_TYPE_REDIST, &REDISTRIBUTORS)]
    {
        controller.set_device_attr(&kvm_device_attr {
            group: KVM_DEV_ARM_VGIC_GRP_ADDR,
            attr: kind.into(),
            addr: core::ptr::from_ref(address) as u64,
            flags: 0,
        })?;
    }
    controller.set_device_attr(&kvm_device_attr {
        group: KVM_DEV_ARM_VGIC_GRP_CTRL,
        attr: KVM_DEV_ARM_VGIC_CTRL_INIT.into(),
        addr: 0,
        flags: 0,
    })?;
    Ok(controller)
}
