//! The parts of a module in files of one tensor a part, as trainers of image models write them: which
//! part a tensor plays by the end of its name, and the modules that the parts of one make.

mod algorithms;
mod modules;

pub use modules::ModuleParts;

/// The role of a tensor in its module, whatever trainers call it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// The first factor of a low-rank product, (r, in, k…).
    Down,
    /// The second, (out, r, 1…).
    Up,
    /// What lies between them in Tucker's form, (r, r, k…).
    Mid,
    /// The bias of the second factor.
    UpBias,
    /// The alpha of the scale alpha / r; for orthogonal blocks their constraint.
    Alpha,
    /// The scale itself, which counts more than an alpha.
    Scale,
    /// DoRA's magnitudes, of the outputs or the inputs by their shape.
    Magnitude,
    /// DoRA's magnitudes of the outputs, whatever their shape.
    OutputMagnitude,
    /// A factor of a Hadamard product (LoHa).
    Hadamard(Hadamard),
    /// A factor of a Kronecker product (LoKr).
    Kronecker(Kronecker),
    /// All that is added to the weight.
    Difference,
    /// All that is added to the bias.
    BiasDifference,
    /// All that is added to the weight of a norm.
    NormDifference,
    /// All that is added to the bias of a norm.
    NormBiasDifference,
    /// A factor of GLoRA.
    GLora(GLora),
    /// LyCORIS's flag of IA³: whether inputs are scaled, and not outputs.
    OnInput,
    /// A tensor under the name of the weight itself: IA³'s vector where [`Part::OnInput`] stands beside
    /// it. A format looks for it alone after all others.
    Weight,
    /// PEFT's vector of IA³.
    Ia3,
    /// The blocks of an orthogonal matrix, or of several (Diag-OFT, BOFT).
    OrthogonalBlocks,
    /// The factor on each output beside them.
    Rescale,
    /// What stands above the diagonals of PEFT's orthogonal blocks.
    OrthogonalElements,
    /// The same of an embedding.
    EmbeddingElements,
    /// What cannot be read, and in words what it is.
    Refused(&'static str),
}

/// The factors of (w1_a·w1_b) ∘ (w2_a·w2_b), and the cores of Tucker's form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names of the formula")]
pub enum Hadamard {
    W1A,
    W1B,
    W2A,
    W2B,
    T1,
    T2,
}

/// The factors of w1 ⊗ w2, either whole or as a product, and the core of Tucker's form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names of the formula")]
pub enum Kronecker {
    W1,
    W1A,
    W1B,
    W2,
    W2A,
    W2B,
    T2,
}

/// The factors of W·(a1·a2) + b1·b2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names of the formula")]
pub enum GLora {
    A1,
    A2,
    B1,
    B2,
    BM,
}

/// The programs that end a tensor's name so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Spelling {
    /// kohya's scripts and all that follow them: `.lora_down.weight`.
    Kohya,
    /// LyCORIS, for what is no plain product: `.hada_w1_a`.
    Lycoris,
    /// PEFT and diffusers: `.lora_A.weight`.
    Peft,
    /// The same with the adapter's name: `.lora_A.default.weight`.
    PeftDefault,
    /// The same without an ending: `.lora_A`.
    PeftBare,
    /// Early releases of diffusers: `.lora.down.weight`.
    LoraLayer,
    /// The same for text encoders: `.lora_linear_layer.down.weight`.
    LoraLinearLayer,
    /// The same for attention processors: `_lora.down.weight`.
    AttentionProcessor,
    /// An ending that several of them write.
    Shared,
}

const T_LORA: &str = "a part of a T-LoRA, whose update needs the factors that it began with, which \
                      come from a decomposition of the base";
const SPARSE: &str = "a sparse part that early releases of LyCORIS wrote beside the factors";
const FORK: &str = "of a fork that changes how magnitudes are applied";
const OFT: &str = "a part of an OFT of early releases of LyCORIS";
const WHOLE: &str = "a parameter that replaces the base's, or widens it, as Flux's control adapters \
                     have it";

/// Every ending with the part and the spelling; the longest that fits counts.
const ENDINGS: &[(&str, Part, Spelling)] = &[
    (".lora_down.weight", Part::Down, Spelling::Kohya),
    (".lora_up.weight", Part::Up, Spelling::Kohya),
    (".lora_mid.weight", Part::Mid, Spelling::Kohya),
    (".lora_A.weight", Part::Down, Spelling::Peft),
    (".lora_B.weight", Part::Up, Spelling::Peft),
    (".lora_B.bias", Part::UpBias, Spelling::Peft),
    (".lora_A.default.weight", Part::Down, Spelling::PeftDefault),
    (".lora_B.default.weight", Part::Up, Spelling::PeftDefault),
    (".lora_B.default.bias", Part::UpBias, Spelling::PeftDefault),
    (".lora_A", Part::Down, Spelling::PeftBare),
    (".lora_B", Part::Up, Spelling::PeftBare),
    (".lora.down.weight", Part::Down, Spelling::LoraLayer),
    (".lora.up.weight", Part::Up, Spelling::LoraLayer),
    (".lora_linear_layer.down.weight", Part::Down, Spelling::LoraLinearLayer),
    (".lora_linear_layer.up.weight", Part::Up, Spelling::LoraLinearLayer),
    ("_lora.down.weight", Part::Down, Spelling::AttentionProcessor),
    ("_lora.up.weight", Part::Up, Spelling::AttentionProcessor),
    (".hada_w1_a", Part::Hadamard(Hadamard::W1A), Spelling::Lycoris),
    (".hada_w1_b", Part::Hadamard(Hadamard::W1B), Spelling::Lycoris),
    (".hada_w2_a", Part::Hadamard(Hadamard::W2A), Spelling::Lycoris),
    (".hada_w2_b", Part::Hadamard(Hadamard::W2B), Spelling::Lycoris),
    (".hada_t1", Part::Hadamard(Hadamard::T1), Spelling::Lycoris),
    (".hada_t2", Part::Hadamard(Hadamard::T2), Spelling::Lycoris),
    (".lokr_w1", Part::Kronecker(Kronecker::W1), Spelling::Lycoris),
    (".lokr_w1_a", Part::Kronecker(Kronecker::W1A), Spelling::Lycoris),
    (".lokr_w1_b", Part::Kronecker(Kronecker::W1B), Spelling::Lycoris),
    (".lokr_w2", Part::Kronecker(Kronecker::W2), Spelling::Lycoris),
    (".lokr_w2_a", Part::Kronecker(Kronecker::W2A), Spelling::Lycoris),
    (".lokr_w2_b", Part::Kronecker(Kronecker::W2B), Spelling::Lycoris),
    (".lokr_t2", Part::Kronecker(Kronecker::T2), Spelling::Lycoris),
    (".diff", Part::Difference, Spelling::Shared),
    (".diff_b", Part::BiasDifference, Spelling::Shared),
    (".w_norm", Part::NormDifference, Spelling::Lycoris),
    (".b_norm", Part::NormBiasDifference, Spelling::Lycoris),
    (".a1.weight", Part::GLora(GLora::A1), Spelling::Lycoris),
    (".a2.weight", Part::GLora(GLora::A2), Spelling::Lycoris),
    (".b1.weight", Part::GLora(GLora::B1), Spelling::Lycoris),
    (".b2.weight", Part::GLora(GLora::B2), Spelling::Lycoris),
    (".bm.weight", Part::GLora(GLora::BM), Spelling::Lycoris),
    (".on_input", Part::OnInput, Spelling::Lycoris),
    (".weight", Part::Weight, Spelling::Shared),
    (".ia3_l", Part::Ia3, Spelling::Peft),
    (".oft_blocks", Part::OrthogonalBlocks, Spelling::Lycoris),
    (".rescale", Part::Rescale, Spelling::Lycoris),
    (".alpha", Part::Alpha, Spelling::Shared),
    (".scale", Part::Scale, Spelling::Shared),
    (".dora_scale", Part::Magnitude, Spelling::Shared),
    (".magnitude", Part::Magnitude, Spelling::Shared),
    (".lora_magnitude_vector", Part::OutputMagnitude, Spelling::Peft),
    (".lora_magnitude_vector.weight", Part::OutputMagnitude, Spelling::Peft),
    (".lora_magnitude_vector.default.weight", Part::OutputMagnitude, Spelling::PeftDefault),
    (".q_layer.weight", Part::Refused(T_LORA), Spelling::Lycoris),
    (".p_layer.weight", Part::Refused(T_LORA), Spelling::Lycoris),
    (".lambda_layer", Part::Refused(T_LORA), Spelling::Lycoris),
    (".bias_indices", Part::Refused(SPARSE), Spelling::Lycoris),
    (".bias_values", Part::Refused(SPARSE), Spelling::Lycoris),
    (".bias_size", Part::Refused(SPARSE), Spelling::Lycoris),
    (".wd_for_diff", Part::Refused(FORK), Spelling::Lycoris),
    (".bora_scale_r", Part::Refused(FORK), Spelling::Lycoris),
    (".bora_scale_c", Part::Refused(FORK), Spelling::Lycoris),
    (".oft_R.weight", Part::OrthogonalElements, Spelling::Peft),
    (".oft_embedding_R.weight", Part::EmbeddingElements, Spelling::Peft),
    (".oft_diag", Part::Refused(OFT), Spelling::Lycoris),
    (".set_weight", Part::Refused(WHOLE), Spelling::Shared),
    (".reshape_weight", Part::Refused(WHOLE), Spelling::Shared),
];

/// A key's module, the part that the tensor plays in it, and who writes it so.
pub fn split(key: &str) -> Option<(&str, Part, Spelling)> {
    let found = ENDINGS.iter().filter_map(|(ending, part, spelling)| {
        let module = key.strip_suffix(ending).filter(|module| !module.is_empty())?;
        Some((module, *part, *spelling))
    });
    found.min_by_key(|(module, ..)| module.len())
}

/// The ending of a part's name in a spelling, which all share where no plain LoRA's part is meant.
pub fn ending(part: Part, spelling: Spelling) -> Option<&'static str> {
    let of = |wanted: Spelling| {
        let found = ENDINGS.iter().find(|(_, own, other)| *own == part && *other == wanted);
        found.map(|(ending, ..)| *ending)
    };
    of(spelling).or_else(|| of(Spelling::Lycoris)).or_else(|| of(Spelling::Shared))
}

/// Whether the first extent of a part is the rank as trainers call it.
pub fn tells_rank(part: Part) -> bool {
    matches!(
        part,
        Part::Down
            | Part::Hadamard(Hadamard::W1B)
            | Part::Kronecker(Kronecker::W1B | Kronecker::W2B)
    )
}

/// Where a module's scale comes from.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ScaleRule {
    /// What it is where the file has no alpha for the module.
    pub default: DefaultScale,
    /// Whether it counts even for a Kronecker product whose factors are both stored whole, as in PEFT.
    pub scales_whole_factors: bool,
}

/// The scale of a module without an alpha of its own.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum DefaultScale {
    /// It is 1.
    #[default]
    One,
    /// It is this over the rank that is stored.
    Alpha(f64),
    /// It is this, which was made of that alpha.
    Factor {
        /// The scale.
        scaling: f64,
        /// The alpha.
        alpha: f64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ending_tells_the_part_and_who_writes_it_so() {
        for (key, module, part, spelling) in [
            ("lora_unet_a.lora_down.weight", "lora_unet_a", Part::Down, Spelling::Kohya),
            ("a.b.lora_B.default.weight", "a.b", Part::Up, Spelling::PeftDefault),
            ("a.b.lora_A", "a.b", Part::Down, Spelling::PeftBare),
            ("a.lora.up.weight", "a", Part::Up, Spelling::LoraLayer),
            ("a.processor.to_q_lora.up.weight", "a.processor.to_q", Part::Up, {
                Spelling::AttentionProcessor
            }),
            ("a.lora_linear_layer.down.weight", "a", Part::Down, Spelling::LoraLinearLayer),
            ("a.lokr_w1_a", "a", Part::Kronecker(Kronecker::W1A), Spelling::Lycoris),
            ("a.lokr_w1", "a", Part::Kronecker(Kronecker::W1), Spelling::Lycoris),
            ("a.a1.weight", "a", Part::GLora(GLora::A1), Spelling::Lycoris),
            ("a.weight", "a", Part::Weight, Spelling::Shared),
            ("a.diff_b", "a", Part::BiasDifference, Spelling::Shared),
            ("a.lora_magnitude_vector.weight", "a", Part::OutputMagnitude, Spelling::Peft),
            ("a.bora_scale_r", "a", Part::Refused(FORK), Spelling::Lycoris),
        ] {
            assert_eq!(split(key), Some((module, part, spelling)), "{key}");
        }
        assert_eq!(split(".alpha"), None);
        assert_eq!(split("a.bias"), None);
    }
}
