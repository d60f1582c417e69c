//! Affinity: how the architecture names a CPU, and what a vCPU is called.
//!
//! Purpose: MPIDR_EL1, the PSCI target argument, GICD_IROUTER and ICC_SGI1R_EL1 all name CPUs by affinity. A guest sees the
//! names that QEMU's `virt` machine gives with GICv3: sixteen CPUs to a cluster, so a VM's up to [`MAX_VCPUS`] vCPUs are
//! Aff0 0–7 of cluster 0.
//!
//! Invariants: [`Affinity::of_vcpu`] and [`Affinity::vcpu`] are inverse; no value from a guest panics.

/// vCPUs that one VM can have.
pub const MAX_VCPUS: usize = 8;

/// MPIDR_EL1 bit 31, RES1.
const RES1: u64 = 1 << 31;
/// MPIDR_EL1.{Aff3,Aff2,Aff1,Aff0}: bits 39:32 and 23:0.
const AFFINITY: u64 = 0x0000_00ff_00ff_ffff;

/// The four affinity levels of a CPU (Arm DDI 0487 D24.2 MPIDR_EL1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Affinity {
    /// Level 3.
    pub aff3: u8,
    /// Level 2.
    pub aff2: u8,
    /// Level 1.
    pub aff1: u8,
    /// Level 0.
    pub aff0: u8,
}

impl Affinity {
    /// The name of vCPU `index`. An index from [`MAX_VCPUS`] on names no vCPU.
    #[inline]
    pub const fn of_vcpu(index: u8) -> Self {
        Self { aff3: 0, aff2: 0, aff1: index >> 4, aff0: index & 0xf }
    }

    /// The vCPU of a VM with `count` vCPUs that has this name.
    #[inline]
    pub const fn vcpu(self, count: usize) -> Option<usize> {
        let named = self.aff3 == 0 && self.aff2 == 0 && self.aff1 == 0 && (self.aff0 as usize) < count;
        if named { Some(self.aff0 as usize) } else { None }
    }

    /// The affinity fields of an MPIDR_EL1 value; the other bits are not looked at.
    #[inline]
    pub const fn from_mpidr(mpidr: u64) -> Self {
        Self { aff3: (mpidr >> 32) as u8, aff2: (mpidr >> 16) as u8, aff1: (mpidr >> 8) as u8, aff0: mpidr as u8 }
    }

    /// A PSCI `target_cpu` argument: affinity fields, every other bit 0 (Arm DEN 0022 5.1.4), else `None`.
    #[inline]
    pub const fn from_psci(target: u64) -> Option<Self> {
        if target & !AFFINITY != 0 { None } else { Some(Self::from_mpidr(target)) }
    }

    /// Fields in the layout of MPIDR_EL1, PSCI arguments, and GICD_IROUTER.
    #[inline]
    pub const fn fields(self) -> u64 {
        (self.aff3 as u64) << 32 | (self.aff2 as u64) << 16 | (self.aff1 as u64) << 8 | self.aff0 as u64
    }

    /// VMPIDR_EL2 for a vCPU of this name: RES1 set, a multiprocessor (U = 0), no multithreading (MT = 0).
    #[inline]
    pub const fn mpidr(self) -> u64 {
        RES1 | self.fields()
    }
}

/// A software generated interrupt, as ICC_SGI0R_EL1, ICC_SGI1R_EL1 and ICC_ASGI1R_EL1 describe it (IHI 0069 12.2.13).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sgi {
    /// 0–15.
    pub intid: u8,
    /// Who gets it.
    pub targets: SgiTargets,
}

/// The CPUs that an SGI is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SgiTargets {
    /// IRM = 1: everyone but the sender.
    Others,
    /// IRM = 0: bit n of `list` is Aff0 = 16 × `range` + n in the cluster of `cluster` (whose Aff0 is not looked at).
    List {
        /// Aff3, Aff2, Aff1.
        cluster: Affinity,
        /// RS.
        range: u8,
        /// TargetList.
        list: u16,
    },
}

impl Sgi {
    /// TargetList 15:0, Aff1 23:16, INTID 27:24, Aff2 39:32, IRM 40, RS 47:44, Aff3 55:48.
    #[inline]
    pub const fn decode(raw: u64) -> Self {
        let targets = if raw & (1 << 40) != 0 {
            SgiTargets::Others
        } else {
            let cluster =
                Affinity { aff3: (raw >> 48) as u8, aff2: (raw >> 32) as u8, aff1: (raw >> 16) as u8, aff0: 0 };
            SgiTargets::List { cluster, range: (raw >> 44) as u8 & 0xf, list: raw as u16 }
        };
        Self { intid: (raw >> 24) as u8 & 0xf, targets }
    }

    /// The register value that [`Sgi::decode`] reads as this.
    pub const fn encode(self) -> u64 {
        let targets = match self.targets {
            SgiTargets::Others => 1 << 40,
            SgiTargets::List { cluster, range, list } => {
                (cluster.aff3 as u64) << 48
                    | (range as u64 & 0xf) << 44
                    | (cluster.aff2 as u64) << 32
                    | (cluster.aff1 as u64) << 16
                    | list as u64
            }
        };
        targets | (self.intid as u64 & 0xf) << 24
    }

    /// Bit n: vCPU n of a VM with `count` vCPUs gets it, when vCPU `sender` sends it. Names of no vCPU are ignored.
    #[inline]
    pub const fn vcpus(self, sender: usize, count: usize) -> u8 {
        let count = if count > MAX_VCPUS { MAX_VCPUS } else { count };
        let all = (1u16 << count).wrapping_sub(1);
        let mask = match self.targets {
            SgiTargets::Others if sender < MAX_VCPUS => all & !(1 << sender),
            SgiTargets::Others => all,
            SgiTargets::List { cluster, range: 0, list }
                if cluster.aff3 == 0 && cluster.aff2 == 0 && cluster.aff1 == 0 =>
            {
                list & all
            }
            SgiTargets::List { .. } => 0,
        };
        mask as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn index_and_affinity_are_inverse() {
        for index in 0..MAX_VCPUS {
            let affinity = Affinity::of_vcpu(index as u8);
            assert_eq!(affinity.vcpu(MAX_VCPUS), Some(index));
            assert_eq!(affinity.vcpu(index), None);
            assert_eq!(affinity.mpidr(), 0x8000_0000 | index as u64);
        }
        assert_eq!(Affinity::of_vcpu(16).vcpu(MAX_VCPUS), None);
    }

    #[test]
    fn psci_targets_have_no_stray_bits() {
        assert_eq!(Affinity::from_psci(3), Some(Affinity::of_vcpu(3)));
        assert_eq!(Affinity::from_psci(1 << 31), None);
        assert_eq!(Affinity::from_psci(1 << 40), None);
    }

    #[test]
    fn sgi_targets() {
        assert_eq!(Sgi::decode(1 << 40).vcpus(1, 4), 0b1101);
        assert_eq!(Sgi::decode(0b10_0110).vcpus(0, 4), 0b0110);
        assert_eq!(Sgi::decode(0xffff).vcpus(3, 8), 0xff);
        assert_eq!(Sgi::decode(1 << 16 | 0xffff).vcpus(0, 8), 0);
        assert_eq!(Sgi::decode(1 << 44 | 0xffff).vcpus(0, 8), 0);
        assert_eq!(Sgi::decode(5 << 24 | 1).intid, 5);
    }

    proptest! {
        #[test]
        fn affinity_round_trips(raw: u64) {
            let affinity = Affinity::from_mpidr(raw);
            prop_assert_eq!(affinity.fields(), raw & AFFINITY);
            prop_assert_eq!(Affinity::from_mpidr(affinity.mpidr()), affinity);
            prop_assert_eq!(Affinity::from_psci(affinity.fields()), Some(affinity));
        }

        #[test]
        fn sgi_round_trips(raw: u64, sender in 0usize..20, count in 0usize..20) {
            let sgi = Sgi::decode(raw);
            prop_assert_eq!(Sgi::decode(sgi.encode()), sgi);
            let vcpus = sgi.vcpus(sender, count);
            prop_assert!(count >= MAX_VCPUS || vcpus >> count == 0);
        }
    }
}
