//! The register maps: reset values, what cannot be written, sizes, and accesses at random.

use super::super::{Config, GicError, ListRegisters, MAX_SPIS, Ppi, REDISTRIBUTOR_SIZE, SgiRegister, Vgic};
use super::{std, vgic, vtr};
use proptest::prelude::*;
use std::string::ToString;

const SGI_BASE: u64 = 0x1_0000;

fn dist(vgic: &Vgic, offset: u64) -> u64 {
    vgic.dist_read(offset, 4).0
}

fn redist(vgic: &Vgic, frame: usize, offset: u64) -> u64 {
    vgic.redist_read(frame, offset, 4).0
}

#[test]
fn bad_configurations_name_field_value_and_rule() {
    let error = |vcpus, spis| Vgic::new(Config { vcpus, spis }).err().map(|error| error.to_string());
    assert_eq!(error(0, 256).as_deref(), Some("vcpus = 0: must be 1 to 8"));
    assert_eq!(error(9, 256).as_deref(), Some("vcpus = 9: must be 1 to 8"));
    for spis in [0, 31, 33, MAX_SPIS + 32] {
        let expected = std::format!("spis = {spis}: must be a multiple of 32, from 32 to 960");
        assert_eq!(error(1, spis), Some(expected));
    }
    assert_eq!(error(8, MAX_SPIS), None);
    let vgic = vgic(1, 256);
    assert_eq!(vgic.spi(31), Err(GicError::Spi { intid: 31, limit: 288 }));
    assert_eq!(vgic.spi(288), Err(GicError::Spi { intid: 288, limit: 288 }));
    assert!(vgic.spi(32).is_ok() && vgic.spi(287).is_ok());
    assert!(Ppi::new(15).is_err() && Ppi::new(32).is_err());
    assert_eq!(Ppi::new(27), Ok(Ppi::VIRTUAL_TIMER));
}

#[test]
fn distributor_after_reset() {
    let vgic = vgic(4, 256);
    assert_eq!(dist(&vgic, 0x0000), 0x50, "ARE and DS, groups off");
    assert_eq!(dist(&vgic, 0x0004) & 0x1f, 8, "32 * (8 + 1) INTIDs");
    assert_eq!(dist(&vgic, 0x0004) >> 17 & 1, 0, "no LPIs");
    assert_eq!(dist(&vgic, 0x0004) >> 25 & 1, 0, "1-of-N works");
    assert_eq!(dist(&vgic, 0xffe8), 0x3b, "GICv3");
    for offset in (0x80..0x400).chain(0x400..0x520).chain(0xc00..0xc48).step_by(4) {
        assert_eq!(dist(&vgic, offset), 0, "{offset:#x}");
    }
    assert_eq!(vgic.dist_read(0x6100, 8).0, 0);
}

#[test]
fn redistributors_after_reset() {
    let vgic = vgic(4, 32);
    for frame in 0..4 {
        let typer = vgic.redist_read(frame, 8, 8).0;
        assert_eq!(typer, (frame as u64) << 32 | (frame as u64) << 8 | if frame == 3 { 1 << 4 } else { 0 });
        assert_eq!(redist(&vgic, frame, 8) | redist(&vgic, frame, 12) << 32, typer);
        assert_eq!(redist(&vgic, frame, 0x14), 6, "asleep");
        assert_eq!(redist(&vgic, frame, 0xffe8), 0x3b);
        assert_eq!(redist(&vgic, frame, SGI_BASE + 0xc00), 0xaaaa_aaaa, "SGIs are edges");
        assert_eq!(redist(&vgic, frame, SGI_BASE + 0xc04), 0);
        for offset in (0x80..0xc00).step_by(4) {
            assert_eq!(redist(&vgic, frame, SGI_BASE + offset), 0, "{offset:#x}");
        }
    }
    assert_eq!(redist(&vgic, 4, 0x14), 0, "no such vCPU");
}

#[test]
fn what_is_fixed_stays() {
    let vgic = vgic(1, 32);
    for offset in [0x0004, 0x0008, 0xffe8, 0x0e00, 0x0800, 0x0020, 0x0100] {
        let before = dist(&vgic, offset);
        assert!(vgic.dist_write(offset, 4, u64::from(u32::MAX)).is_empty());
        assert_eq!(dist(&vgic, offset), before, "{offset:#x}");
    }
    assert!(!vgic.dist_write(0, 4, u64::from(u32::MAX)).is_empty());
    assert_eq!(dist(&vgic, 0), 0x53);
    let _ = vgic.redist_write(0, SGI_BASE + 0xc00, 4, 0);
    assert_eq!(redist(&vgic, 0, SGI_BASE + 0xc00), 0xaaaa_aaaa);
    // Unimplemented interrupts: INTID 64 and up.
    for offset in [0x88, 0x108, 0x208, 0x440, 0xc10, 0x6200] {
        assert!(vgic.dist_write(offset, 4, u64::from(u32::MAX)).is_empty());
        assert_eq!(dist(&vgic, offset), 0, "{offset:#x}");
    }
}

#[test]
fn sizes_that_no_register_supports_do_nothing() {
    let vgic = vgic(1, 32);
    for (offset, size) in [(0, 1), (0, 2), (0, 8), (2, 4), (0x104, 8), (0x105, 4), (0x104, 1), (0x420, 2), (0x6102, 4)]
    {
        assert!(vgic.dist_write(offset, size, u64::MAX).is_empty(), "{offset:#x} {size}");
        assert_eq!(vgic.dist_read(offset, size).0, 0, "{offset:#x} {size}");
    }
    assert_eq!(dist(&vgic, 0), 0x50);
    assert_eq!(dist(&vgic, 0x104), 0);
}

#[test]
fn priorities_by_byte_and_word() {
    let vgic = vgic(1, 32);
    let _ = vgic.dist_write(0x421, 1, 0xff);
    assert_eq!(dist(&vgic, 0x420), 0xf800);
    let _ = vgic.dist_write(0x420, 4, 0xa0b0_c0d7);
    assert_eq!(dist(&vgic, 0x420), 0xa0b0_c0d0);
    assert_eq!(vgic.dist_read(0x423, 1).0, 0xa0);
}

#[test]
fn routers_whole_and_by_half() {
    let vgic = vgic(2, 32);
    let _ = vgic.dist_write(0x6108, 8, u64::MAX);
    assert_eq!(vgic.dist_read(0x6108, 8).0, 0xff_80ff_ffff);
    let _ = vgic.dist_write(0x610c, 4, 0x12);
    assert_eq!(vgic.dist_read(0x6108, 8).0, 0x12_80ff_ffff);
    let _ = vgic.dist_write(0x6108, 4, 1);
    assert_eq!(vgic.dist_read(0x6108, 8).0, 0x12_0000_0001);
    assert_eq!((dist(&vgic, 0x6108), dist(&vgic, 0x610c)), (1, 0x12));
}

#[test]
fn reset_forgets_all_but_the_wires() {
    let vgic = vgic(1, 32);
    let mut image = ListRegisters::new(vtr(4));
    image.vmcr = 0xff00_0003;
    let _ = vgic.set_spi(vgic.spi(33).expect("it exists"), true);
    let enable = |vgic: &Vgic| vgic.dist_write(0, 4, 3) | vgic.dist_write(0x104, 4, 2);
    let _ = enable(&vgic);
    let _ = vgic.flush(0, &mut image);
    assert_eq!(image.live(), 1);
    let _ = vgic.reset();
    assert_eq!((dist(&vgic, 0), dist(&vgic, 0x104), dist(&vgic, 0x304)), (0x50, 0, 0));
    assert!(vgic.needs_sync(0));
    let _ = vgic.flush(0, &mut image);
    assert_eq!(image.live(), 0);
    let _ = enable(&vgic);
    assert!(vgic.deliverable(0, &image), "the device still drives its line");
}

#[derive(Clone, Debug)]
enum Access {
    Dist {
        offset: u64,
        size: u8,
        value: u64,
    },
    Redist {
        frame: usize,
        offset: u64,
        size: u8,
        value: u64,
    },
    Sgi {
        from: usize,
        value: u64,
    },
    Deactivate {
        vcpu: usize,
        intid: u64,
    },
    /// The list registers come back with anything in them.
    Flush {
        vcpu: usize,
        noise: u64,
    },
}

fn offset(end: u64) -> impl Strategy<Value = u64> {
    prop_oneof![3 => (0..0x2000u64 / 4).prop_map(|word| word * 4), 1 => 0..end, 1 => any::<u64>(),
        2 => (0x6000u64 / 4..0x8000 / 4).prop_map(|word| word * 4)]
}

fn access() -> impl Strategy<Value = Access> {
    let size = prop_oneof![4 => Just(4u8), 1 => Just(1u8), 1 => Just(8u8), 1 => any::<u8>()];
    prop_oneof![
        4 => (offset(0x1_0000), size.clone(), any::<u64>())
            .prop_map(|(offset, size, value)| Access::Dist { offset, size, value }),
        4 => (0usize..10, offset(REDISTRIBUTOR_SIZE), any::<bool>(), size, any::<u64>()).prop_map(
            |(frame, offset, sgi, size, value)| {
                let offset = if sgi { offset.wrapping_add(SGI_BASE) } else { offset };
                Access::Redist { frame, offset, size, value }
            }),
        1 => (0usize..8, any::<u64>()).prop_map(|(from, value)| Access::Sgi { from, value }),
        1 => (0usize..8, any::<u64>()).prop_map(|(vcpu, intid)| Access::Deactivate { vcpu, intid: intid >> (intid % 64) }),
        2 => (0usize..8, any::<u64>()).prop_map(|(vcpu, noise)| Access::Flush { vcpu, noise }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn accesses_at_random_never_panic(accesses in prop::collection::vec(access(), 1..300)) {
        let vgic = vgic(8, 256);
        let mut images: std::vec::Vec<_> = (0..8).map(|_| ListRegisters::new(vtr(4))).collect();
        for access in accesses {
            let kick = match access {
                Access::Dist { offset, size, value } => {
                    vgic.dist_write(offset, size, value) | vgic.dist_read(offset, size).1
                }
                Access::Redist { frame, offset, size, value } => {
                    vgic.redist_write(frame, offset, size, value) | vgic.redist_read(frame, offset, size).1
                }
                Access::Sgi { from, value } => vgic.sgi(from, SgiRegister::Sgi1r, value),
                Access::Deactivate { vcpu, intid } => {
                    images[vcpu].vmcr |= 1 << 9;
                    vgic.deactivate(vcpu, &mut images[vcpu], intid)
                }
                Access::Flush { vcpu, noise } => {
                    let image = &mut images[vcpu];
                    for (index, lr) in image.lr.iter_mut().enumerate() {
                        *lr = noise.rotate_left(index as u32 * 7);
                    }
                    (image.hcr, image.vmcr) = (image.hcr ^ noise, noise.rotate_left(32));
                    let flush = vgic.flush(vcpu, image);
                    prop_assert!(image.live() <= 4 && flush.write <= 4);
                    flush.kick
                }
            };
            prop_assert!(kick.iter().all(|vcpu| vgic.needs_sync(vcpu)));
        }
    }
}
