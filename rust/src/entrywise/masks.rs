//! Random masks that are the same on every machine: numbers by their place, from a counter-based generator.

/// 2⁶⁴ divided by the golden ratio: the step of SplitMix64.
const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// What SplitMix64 makes of its state.
fn mix(state: u64) -> u64 {
    let state = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    state ^ (state >> 31)
}

/// The hash of Fowler, Noll and Vo (1a, 64 bits).
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}

/// The random numbers of one tensor of one adapter: those that SplitMix64 gives in turn from a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mask {
    key: u64,
    /// The index of the first element.
    first: u64,
}

impl Mask {
    /// The numbers of a seed for a module, by its path without `base_model.model.` and `.weight`, and an
    /// adapter, by its position in the list.
    pub fn new(seed: u64, module: &str, ordinal: usize) -> Self {
        let name = format!("{module}#{ordinal}");
        Self { key: mix(seed.wrapping_add(GAMMA)) ^ fnv1a(name.as_bytes()), first: 0 }
    }

    /// Those of a part of the module, which begins after so many elements.
    #[must_use]
    pub fn after(self, elements: u64) -> Self {
        Self { first: self.first + elements, ..self }
    }

    fn number(self, index: u64) -> u64 {
        let index = self.first + index;
        mix(self.key.wrapping_add(index.wrapping_add(1).wrapping_mul(GAMMA)))
    }

    /// The number of the element of that index, in row-major order; uniform in [0, 1).
    pub fn uniform(self, index: u64) -> f64 {
        (self.number(index) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_gives_the_published_numbers() {
        assert_eq!(mix(GAMMA), 0xe220_a839_7b1d_cdaf);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
    }

    #[test]
    fn masks_depend_on_seed_module_and_ordinal_alone() {
        let mask = Mask::new(42, "model.layers.0.self_attn.q_proj", 0);
        assert_eq!(mask.key, 0xd53e_53da_cbf6_c7ed);
        let numbers = [0x7c04_3e24_6c60_57ed, 0x1b6f_47cc_a2c4_3e59, 0xdc34_be01_2367_9401];
        assert_eq!([0, 1, 2].map(|index| mask.number(index)), numbers);
        let kept: Vec<u8> = (0..12).map(|index| u8::from(mask.uniform(index) < 0.5)).collect();
        assert_eq!(kept, [1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1]);
        assert_eq!(mask.after(2).number(0), numbers[2]);
        assert_ne!(mask, Mask::new(42, "model.layers.0.self_attn.q_proj", 1));
        assert_ne!(mask, Mask::new(43, "model.layers.0.self_attn.q_proj", 0));
        assert_ne!(mask, Mask::new(42, "model.layers.1.self_attn.q_proj", 0));
    }
}
