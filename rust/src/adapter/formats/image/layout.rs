//! Which of the formats of image models' adapters a file is in, by its keys and its metadata.

use indexmap::IndexMap;

use super::names;
use crate::adapter::formats::parts::{self, Part, Spelling};
use crate::checkpoint::components::is_denoisers;

/// A format of files that hold one adapter of an image model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// diffusers' components before dotted names: `unet.…`, `transformer.…`, `text_encoder.…`.
    Diffusers,
    /// ComfyUI's: `diffusion_model.…`, `text_encoders.…`.
    ComfyUi,
    /// LyCORIS on whatever module: `lycoris_…`.
    Lycoris,
    /// OneTrainer's own: with its metadata, `lora_transformer_…`, numbered parts, alphas beside bare names.
    OneTrainer,
    /// XLabs' trainer of Flux: `double_blocks.0.processor.qkv_lora1.…`.
    XLabs,
    /// Black Forest Labs': the names of Flux's authors as they are.
    Bfl,
    /// cloneofsimo's lora, with layers by number: `unet:0:up`.
    CloneOfSimo,
    /// kohya's, which has a reader of its own: `lora_unet_…`.
    Kohya,
}

impl Layout {
    /// The format's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Diffusers => "diffusers",
            Self::ComfyUi => "comfyui",
            Self::Lycoris => "lycoris",
            Self::OneTrainer => "onetrainer",
            Self::XLabs => "xlabs",
            Self::Bfl => "bfl",
            Self::CloneOfSimo => "cloneofsimo",
            Self::Kohya => "kohya",
        }
    }
}

/// What a file's keys tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recognized {
    /// Nothing of image models.
    Nothing,
    /// The format.
    As(Layout),
    /// Several, each with one of its keys.
    Ambiguous(Vec<(Layout, String)>),
}

/// Beginnings of names with the format that they tell; those of diffusers' transformers are not alone
/// in theirs.
const BEGINNINGS: [(&str, Layout); 12] = [
    ("model.diffusion_model.", Layout::ComfyUi),
    ("diffusion_model.", Layout::ComfyUi),
    ("text_encoders.", Layout::ComfyUi),
    ("unet.", Layout::Diffusers),
    ("prior.", Layout::Diffusers),
    ("text_encoder.", Layout::Diffusers),
    ("text_encoder_2.", Layout::Diffusers),
    ("text_encoder_3.", Layout::Diffusers),
    ("clip_l.", Layout::OneTrainer),
    ("clip_g.", Layout::OneTrainer),
    ("t5.", Layout::OneTrainer),
    ("t5xxl.", Layout::OneTrainer),
];
/// Beginnings that models of other kinds have as well: the format where an image model's names follow.
const COMMON: [(&str, Layout); 3] = [
    ("transformer.", Layout::Diffusers),
    ("transformer_2.", Layout::Diffusers),
    ("net.", Layout::ComfyUi),
];
/// What flattened names begin with, whichever trainer flattened them.
const FLATTENED: [&str; 5] =
    ["lora_unet_", "lora_transformer_", "lora_prior_", "lora_te", "lycoris_"];
/// What PEFT puts before the names of a model.
const PEFT: &str = "base_model.model.";
/// Blocks whose names only the models' authors give.
const ORIGINAL: [&str; 6] = [
    "double_blocks.",
    "single_blocks.",
    "joint_blocks.",
    "input_blocks.",
    "middle_block.",
    "output_blocks.",
];
/// Those of Flux.
const FLUX: [&str; 2] = ["double_blocks.", "single_blocks."];

/// The format of a file with these tensors and these keys of metadata.
pub fn recognize<'a>(
    names: impl Iterator<Item = &'a str>,
    mut metadata: impl Iterator<Item = &'a str>,
) -> Recognized {
    let mut found = Found::default();
    for name in names {
        found.look(name);
    }
    found.decide(metadata.any(|key| key.starts_with("ot_")))
}

/// What the keys of a file tell, one after the other.
#[derive(Debug, Default)]
struct Found {
    /// By format, the first of its keys.
    told: IndexMap<Layout, String>,
    /// Names after which only those of an image model decide, and the format if one is there.
    common: IndexMap<Layout, String>,
    is_image_model: bool,
    /// The first key of a text encoder under a flattened name.
    text_encoder: Option<String>,
    /// The first key without a component before it.
    bare: Option<String>,
    bare_is_image_model: bool,
    bare_is_flux: bool,
    bare_has_alpha: bool,
    bare_is_of_peft: bool,
}

impl Found {
    fn tell(&mut self, layout: Layout, key: &str) {
        self.told.entry(layout).or_insert_with(|| key.to_owned());
    }

    fn look(&mut self, key: &str) {
        if names::numbered(key).is_some() {
            return self.tell(Layout::CloneOfSimo, key);
        }
        if names::of_xlabs(key).is_some() {
            return self.tell(Layout::XLabs, key);
        }
        let Some((module, part, spelling)) = parts::split(key) else { return };
        if part == Part::Alpha {
            let is_bare = module.contains('.') && component(module).is_none();
            self.bare_has_alpha |= is_bare;
            return;
        }
        if !adds(part) {
            return;
        }
        let is_bare =
            matches!(spelling, Spelling::Peft | Spelling::PeftDefault | Spelling::PeftBare);
        if !module.contains('.') && (!is_bare || is_flattened(module)) {
            return self.look_at_flattened(module, key);
        }
        let Some((layout, body, is_common)) = component(module) else {
            return self.look_at_bare(module, part, spelling, key);
        };
        let body = body.strip_prefix(PEFT).unwrap_or(body);
        // OneTrainer's files have the authors' names below diffusers' components.
        let is_original = ORIGINAL.iter().any(|blocks| body.starts_with(blocks));
        let layout = match layout {
            Layout::Diffusers if is_original && spelling == Spelling::Kohya => Layout::OneTrainer,
            layout => layout,
        };
        if is_common {
            self.is_image_model |= is_image_models(body);
            self.common.entry(layout).or_insert_with(|| key.to_owned());
        } else {
            self.tell(layout, key);
        }
    }

    fn look_at_flattened(&mut self, module: &str, key: &str) {
        let begins = |beginning: &str| module.starts_with(beginning);
        if begins("lycoris_") {
            self.tell(Layout::Lycoris, key);
        } else if begins("lora_transformer_") {
            self.tell(Layout::OneTrainer, key);
        } else if !begins("lora_te") && !begins("lora_prior_te") {
            self.tell(Layout::Kohya, key);
        } else {
            // Those of text encoders are alike in several formats.
            self.text_encoder.get_or_insert_with(|| key.to_owned());
        }
    }

    fn look_at_bare(&mut self, module: &str, part: Part, spelling: Spelling, key: &str) {
        let is_of_peft = module.starts_with(PEFT);
        // PEFT's other methods have alphas in their config.
        if is_of_peft && !matches!(part, Part::Down | Part::Up) {
            return;
        }
        let body = module.strip_prefix(PEFT).unwrap_or(module);
        self.bare.get_or_insert_with(|| key.to_owned());
        self.bare_is_image_model |= is_image_models(body);
        self.bare_is_flux |= FLUX.iter().any(|blocks| body.starts_with(blocks));
        let peft = [Spelling::Peft, Spelling::PeftDefault, Spelling::PeftBare];
        self.bare_is_of_peft |= is_of_peft || peft.contains(&spelling);
    }

    fn decide(mut self, is_of_onetrainer: bool) -> Recognized {
        if self.is_image_model || !self.told.is_empty() {
            for (layout, key) in std::mem::take(&mut self.common) {
                self.tell(layout, &key);
            }
        }
        if let Some(key) = self.bare.take().filter(|_| self.bare_is_image_model) {
            let layout = match (self.bare_has_alpha && self.bare_is_of_peft, self.bare_is_flux) {
                (true, _) => Layout::OneTrainer,
                (false, true) => Layout::Bfl,
                (false, false) => Layout::Diffusers,
            };
            self.tell(layout, &key);
        }
        if let Some(key) = self.text_encoder.take().filter(|_| self.told.is_empty()) {
            self.tell(Layout::Kohya, &key);
        }
        let mut told: Vec<_> = self.told.into_iter().collect();
        match told.as_slice() {
            [] => Recognized::Nothing,
            [(Layout::XLabs | Layout::CloneOfSimo, _)] => Recognized::As(told[0].0),
            _ if is_of_onetrainer => Recognized::As(Layout::OneTrainer),
            [(only, _)] => Recognized::As(*only),
            _ => {
                told.sort_by_key(|(layout, _)| layout.name());
                Recognized::Ambiguous(told)
            }
        }
    }
}

/// Whether a part adds something to its module, so that its key tells the format.
fn adds(part: Part) -> bool {
    matches!(
        part,
        Part::Down
            | Part::Up
            | Part::Mid
            | Part::Hadamard(_)
            | Part::Kronecker(_)
            | Part::Difference
            | Part::BiasDifference
            | Part::NormDifference
            | Part::NormBiasDifference
            | Part::GLora(_)
            | Part::OnInput
            | Part::OrthogonalBlocks
    )
}

/// The format that a name's beginning tells, what follows, and whether others begin so as well.
fn component(module: &str) -> Option<(Layout, &str, bool)> {
    let of = |table: &[(&str, Layout)]| {
        table
            .iter()
            .find_map(|(beginning, layout)| Some((*layout, module.strip_prefix(beginning)?)))
    };
    let told = of(&BEGINNINGS).map(|(layout, body)| (layout, body, false));
    told.or_else(|| of(&COMMON).map(|(layout, body)| (layout, body, true)))
}

/// Whether a name without dots is a flattened one by its beginning.
pub fn is_flattened(module: &str) -> bool {
    FLATTENED.iter().any(|beginning| module.starts_with(beginning))
}

/// Whether a name is one of an image or video model's denoiser.
fn is_image_models(body: &str) -> bool {
    let is_z_image = body.starts_with("layers.") && body.contains(".attention.to_");
    is_denoisers(body) || body.starts_with("context_refiner.") || is_z_image
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(keys: &[&str], metadata: &[&str]) -> Recognized {
        recognize(keys.iter().copied(), metadata.iter().copied())
    }

    #[test]
    fn keys_tell_the_format() {
        use Layout::{Bfl, CloneOfSimo, ComfyUi, Diffusers, Kohya, Lycoris, OneTrainer, XLabs};
        for (keys, layout) in [
            (&["unet.down_blocks.0.attn1.to_q.lora_A.weight"][..], Diffusers),
            (&["unet.down_blocks.0.attn1.processor.to_q_lora.up.weight"], Diffusers),
            (&["down_blocks.0.attentions.0.attn1.processor.to_q_lora.up.weight"], Diffusers),
            (&["text_encoder.text_model.x.self_attn.to_q_lora.up.weight"], Diffusers),
            (&["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], Diffusers),
            (&["transformer.proj_out.lora_A.weight", "text_encoder.x.y.lora_A.weight"], Diffusers),
            (&["transformer.base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight"], {
                Diffusers
            }),
            (&["base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight"], Diffusers),
            (&["blocks.0.attn2.to_q.lora_A.default.weight"], Diffusers),
            (&["transformer_blocks.0.attn.to_q.lora_down.weight"], Diffusers),
            (&["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"], ComfyUi),
            (&["diffusion_model.blocks.0.self_attn.q.diff_b"], ComfyUi),
            (&["text_encoders.clip_l.transformer.text_model.x.lora_up.weight"], ComfyUi),
            (&["net.blocks.0.cross_attn.q_proj.lora_A.weight"], ComfyUi),
            (&["lycoris_blocks_0_attn1_to_q.lokr_w1"], Lycoris),
            (&["lora_transformer_x_to_q.lora_up.weight", "lora_te1_x.lora_up.weight"], OneTrainer),
            (&["transformer.double_blocks.0.img_attn.qkv.0.lora_up.weight"], OneTrainer),
            (
                &[
                    "double_blocks.0.img_attn.qkv.lora_A.weight",
                    "double_blocks.0.img_attn.qkv.alpha",
                ],
                { OneTrainer },
            ),
            (&["double_blocks.0.processor.qkv_lora1.up.weight"], XLabs),
            (&["double_blocks.0.img_attn.qkv.lora_B.weight", "img_in.lora_B.bias"], Bfl),
            (&["base_model.model.double_blocks.0.img_attn.qkv.lora_B.weight"], Bfl),
            (&["unet:0:up", "unet:0:down", "<s1>"], CloneOfSimo),
            (&["lora_unet_x.lora_up.weight", "lora_te_x.lora_up.weight"], Kohya),
        ] {
            assert_eq!(of(keys, &[]), Recognized::As(layout), "{keys:?}");
        }
        for keys in [
            &["model.layers.0.q_proj.lora_A.weight"][..],
            &["transformer.h.0.attn.c_attn.lora_A.weight"],
            &["base_model.model.transformer_blocks.0.attn.to_q.lokr_w1"],
            &["model.layers.0.q_proj.weight"],
        ] {
            assert_eq!(of(keys, &[]), Recognized::Nothing, "{keys:?}");
        }
    }

    #[test]
    fn metadata_of_onetrainer_tells_it() {
        let keys = ["lora_unet_x.lora_up.weight"];
        assert_eq!(of(&keys, &["ot_branch"]), Recognized::As(Layout::OneTrainer));
        assert_eq!(of(&keys, &["ss_network_dim"]), Recognized::As(Layout::Kohya));
        for keys in [
            &["lora_te1_x.lora_up.weight"][..],
            &["transformer.txt_in.lora_up.weight", "transformer.double_blocks.0.x.lora_up.weight"],
        ] {
            assert_eq!(of(keys, &["ot_branch"]), Recognized::As(Layout::OneTrainer), "{keys:?}");
        }
    }

    #[test]
    fn a_flattened_name_may_have_the_endings_of_peft() {
        for (keys, layout) in [
            (&["lora_unet_x.lora_A.weight", "lora_te1_x.lora_B.weight"][..], Layout::Kohya),
            (&["lora_te_x.lora_A.default.weight"], Layout::Kohya),
            (&["lora_unet_x.lora_A"], Layout::Kohya),
            (&["lycoris_x.lora_A.weight"], Layout::Lycoris),
            (&["lora_transformer_x.lora_B.weight"], Layout::OneTrainer),
        ] {
            assert_eq!(of(keys, &[]), Recognized::As(layout), "{keys:?}");
        }
        // A module of a language model at the top.
        assert_eq!(of(&["lora_head.lora_A.weight"], &[]), Recognized::Nothing);
    }

    #[test]
    fn names_of_two_formats_are_ambiguous() {
        let keys = ["lora_unet_x.lora_up.weight", "unet.conv_in.lora_A.weight"];
        let Recognized::Ambiguous(told) = of(&keys, &[]) else { panic!("ambiguous") };
        assert_eq!(
            told.iter().map(|(layout, _)| layout.name()).collect::<Vec<_>>(),
            ["diffusers", "kohya"]
        );
    }
}
