//! A controller that was saved and loaded goes on as the one that was not; a stranger's state harms nobody.

use super::super::{Config, ListRegisters, Saved, Vgic};
use super::{std, vgic, vtr};
use proptest::prelude::*;
use std::string::{String, ToString};
use std::vec::Vec;

const CONFIG: Config = Config { vcpus: 3, spis: 64 };

/// A store anywhere in a frame, or a wire.
type Act = (u8, u16, u32);

fn act(vgic: &Vgic, acts: &[Act]) {
    for &(kind, offset, value) in acts {
        let register = u64::from(offset) & !3;
        let kick = match kind % 4 {
            0 => vgic.dist_write(register % 0x1000, 4, value.into()),
            1 => vgic.redist_write(usize::from(kind) % 3, 0x1_0000 + register % 0x1000, 4, value.into()),
            2 => vgic.dist_write(0x6100 + register % 0x200, 8, u64::from(value & 0x8000_0003)),
            _ => vgic.set_spi(vgic.spi(32 + u32::from(offset) % 64).expect("there are 64"), value & 1 != 0),
        };
        let _nobody_runs = kick;
    }
}

fn registers(vgic: &Vgic) -> Vec<u64> {
    let dist = (0..0x1000).step_by(4).map(|offset| vgic.dist_read(offset, 4).0);
    let routers = (0x6100..0x6300).step_by(8).map(|offset| vgic.dist_read(offset, 8).0);
    let private = (0..3).flat_map(|frame| (0..0x1_1000).step_by(4).map(move |offset| (frame, offset)));
    let private = private.map(|(frame, offset)| vgic.redist_read(frame, offset, 4).0);
    dist.chain(routers).chain(private).collect()
}

fn text(vgic: &Vgic) -> String {
    serde_json::to_string(&vgic.save().expect("heap")).expect("plain data")
}

/// What each vCPU would be given now.
fn given(vgic: &Vgic) -> Vec<[u64; 16]> {
    (0..3)
        .map(|vcpu| {
            let mut image = ListRegisters::new(vtr(4));
            image.vmcr = 0xf8 << 24 | 3;
            let _others = vgic.flush(vcpu, &mut image);
            let given = image.lr;
            let _others = vgic.sync(vcpu, &mut image);
            given
        })
        .collect()
}

proptest! {
    #[test]
    fn what_was_saved_goes_on(acts in prop::collection::vec(any::<Act>(), 0..60), more in prop::collection::vec(any::<Act>(), 0..20)) {
        let old = vgic(CONFIG.vcpus, CONFIG.spis);
        act(&old, &acts);
        let saved: Saved = serde_json::from_str(&text(&old)).expect("its own form");
        let new = saved.load(CONFIG).expect("a state that a controller was in");
        prop_assert_eq!(registers(&new), registers(&old));
        act(&old, &more);
        act(&new, &more);
        prop_assert_eq!(given(&new), given(&old));
        prop_assert_eq!(text(&new), text(&old));
    }

    #[test]
    fn a_strangers_state_is_refused_or_harmless(
        acts in prop::collection::vec(any::<Act>(), 0..40),
        digits in prop::collection::vec((any::<prop::sample::Index>(), b'0'..=b'9'), 1..6),
        more in prop::collection::vec(any::<Act>(), 0..20),
    ) {
        let old = vgic(CONFIG.vcpus, CONFIG.spis);
        act(&old, &acts);
        let mut bytes = text(&old).into_bytes();
        let places: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at].is_ascii_digit()).collect();
        for (at, digit) in digits {
            bytes[*at.get(&places)] = digit;
        }
        if let Ok(saved) = serde_json::from_slice::<Saved>(&bytes)
            && let Ok(new) = saved.load(CONFIG)
        {
            act(&new, &more);
            given(&new);
        }
    }
}

#[test]
fn what_does_not_fit_says_so() {
    let saved = |vcpus| vgic(vcpus, 64).save().expect("heap");
    assert_eq!(
        saved(2).load(CONFIG).err().map(|error| error.to_string()).as_deref(),
        Some("gic.cpus: must be as many as the machine has")
    );
    let other = Config { spis: 32, ..CONFIG };
    assert_eq!(saved(3).load(other).err().map(|error| error.field), Some("gic.spis"));
    let resident = text(&vgic(3, 64)).replacen("\"resident\":0", "\"resident\":4", 1);
    let resident: Saved = serde_json::from_str(&resident).expect("numbers");
    assert_eq!(resident.load(CONFIG).err().map(|error| error.field), Some("gic.resident"));
}
