//! Requests about private memory: audits of the hypervisor's own mapping, and reads that should fault.

use crate::arch::{cpu, own, probe as hardware};
use entresol_addr::Gpa;
use entresol_slot::Hint;
use entresol_wire::Refusal;
use entresol_wire::control::{Audit, Code, Error, Probe, ProbeFault};

use crate::host;
use crate::vm::Vm;

/// Looks at every frame and every object, while guests run.
pub fn audit() -> Audit {
    let host = host::get();
    let pin = host.epoch.pin(cpu::index());
    let found = entresol_backing::audit(&host.supply(pin.cpu()), &host.objects, &pin);
    let entresol_backing::Audit { frames, private, leased, open, stuck, poisoned, pages, wrong, example } = found;
    let own = own::census();
    if let Some(frame) = example {
        log::error!("audit: {wrong} frames break INV-10, frame {frame:#x} among them");
    }
    Audit {
        frames,
        private,
        leased,
        open,
        stuck,
        poisoned,
        pages,
        own_blocks: own.blocks,
        own_tables: own.tables,
        own_absent: own.absent,
        wrong,
        example: example.map(|frame| frame.get()),
    }
}

/// Reads the machine's address behind `address`, without a lease. What was read is told to nobody.
///
/// # Errors
///
/// No page is there.
pub fn probe(vm: &Vm, address: u64) -> Result<Probe, Error> {
    let host = host::get();
    let pin = host.epoch.pin(cpu::index());
    let Some(frame) = vm.memory.frame_behind(&pin, &Hint::new(), Gpa::new(address)) else {
        let refusal = Refusal::new(
            "address",
            format_args!("{address:#x}"),
            "must be memory that was touched and is not poisoned",
        );
        return Err(Error::refused(Code::BadField, refusal));
    };
    let private = host.pool.is_private(frame);
    let fault = hardware::read(frame.base()).err();
    if let Some(fault) = fault {
        log::warn!("vm {}: a read of frame {frame:#x} without a lease was stopped: {fault}", vm.config.name);
    }
    Ok(Probe {
        frame: frame.get(),
        private,
        fault: fault.map(|fault| ProbeFault { syndrome: fault.syndrome, address: fault.address }),
    })
}
