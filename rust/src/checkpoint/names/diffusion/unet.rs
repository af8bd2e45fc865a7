//! Names of UNets: those of Stable Diffusion 1, 2 and XL and of whatever has their structure, whose
//! levels and layers are those of the names at hand.

use std::collections::BTreeSet;

use super::rules::Rule;
use crate::checkpoint::names::canonical::Lie;

/// The modules of a residual block: diffusers' names and the author's.
const RESIDUAL: [(&str, &str); 6] = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
];
/// What a UNet has once.
const ONCE: [(&str, &str); 7] = [
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
];

/// What there is of a UNet: of each level the number of residual blocks, and whether attention stands
/// behind them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Levels {
    down: Vec<Level>,
    up: Vec<Level>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Level {
    layers: usize,
    attention: bool,
}

/// The rules for a UNet that has parameters of these names, in either of the two namings; none where
/// they tell no structure.
pub(super) fn rules(names: &BTreeSet<&str>) -> Vec<Rule> {
    let is_diffusers = begins(names, "down_blocks.");
    let levels = if is_diffusers { of_diffusers(names) } else { of_the_author(names) };
    let mut rules: Vec<_> =
        ONCE.iter().map(|(ours, theirs)| Rule::new(ours, theirs, Lie::Same)).collect();
    let mut residual = |ours: &str, theirs: &str| {
        let modules = RESIDUAL.iter();
        let rule = |(a, b): &(&str, &str)| {
            Rule::new(&format!("{ours}.{a}"), &format!("{theirs}.{b}"), Lie::Same)
        };
        rules.extend(modules.map(rule));
    };
    residual("mid_block.resnets.0", "middle_block.0");
    residual("mid_block.resnets.1", "middle_block.2");
    let mut others = vec![Rule::new("mid_block.attentions.0", "middle_block.1", Lie::Same)];
    let mut other =
        |ours: String, theirs: String| others.push(Rule::new(&ours, &theirs, Lie::Same));
    let mut place = 1;
    for (level, Level { layers, .. }) in levels.down.iter().enumerate() {
        for layer in 0..*layers {
            residual(
                &format!("down_blocks.{level}.resnets.{layer}"),
                &format!("input_blocks.{place}.0"),
            );
            other(
                format!("down_blocks.{level}.attentions.{layer}"),
                format!("input_blocks.{place}.1"),
            );
            place += 1;
        }
        if level + 1 < levels.down.len() {
            other(
                format!("down_blocks.{level}.downsamplers.0.conv"),
                format!("input_blocks.{place}.0.op"),
            );
            place += 1;
        }
    }
    place = 0;
    for (level, Level { layers, attention }) in levels.up.iter().enumerate() {
        for layer in 0..*layers {
            residual(
                &format!("up_blocks.{level}.resnets.{layer}"),
                &format!("output_blocks.{place}.0"),
            );
            if *attention {
                other(
                    format!("up_blocks.{level}.attentions.{layer}"),
                    format!("output_blocks.{place}.1"),
                );
            }
            place += 1;
        }
        if level + 1 < levels.up.len() {
            let behind = if *attention { 2 } else { 1 };
            other(
                format!("up_blocks.{level}.upsamplers.0.conv"),
                format!("output_blocks.{}.{behind}.conv", place - 1),
            );
        }
    }
    rules.extend(others);
    rules
}

/// Whether any name begins so.
fn begins(names: &BTreeSet<&str>, prefix: &str) -> bool {
    names.range(prefix..).next().is_some_and(|name| name.starts_with(prefix))
}

/// How many numbers from 0 on stand behind this in some name.
fn count(names: &BTreeSet<&str>, prefix: &str) -> usize {
    let numbers = names.range(prefix..).take_while(|name| name.starts_with(prefix));
    let numbers = numbers.filter_map(|name| name[prefix.len()..].split('.').next()?.parse().ok());
    numbers.max().map_or(0, |most: usize| most.saturating_add(1).min(MOST))
}

/// How many levels and layers are looked at, whatever numbers the names hold.
const MOST: usize = 64;

fn of_diffusers(names: &BTreeSet<&str>) -> Levels {
    let side = |side: &str| {
        let level = |level| {
            let block = format!("{side}_blocks.{level}.");
            Level {
                layers: count(names, &format!("{block}resnets.")),
                attention: begins(names, &format!("{block}attentions.")),
            }
        };
        (0..count(names, &format!("{side}_blocks."))).map(level).collect()
    };
    Levels { down: side("down"), up: side("up") }
}

fn of_the_author(names: &BTreeSet<&str>) -> Levels {
    let has = |prefix: String| begins(names, &prefix);
    let mut down = vec![Level::default()];
    for place in 1..count(names, "input_blocks.") {
        if has(format!("input_blocks.{place}.0.op.")) {
            down.push(Level::default());
        } else if let Some(level) = down.last_mut() {
            level.layers += 1;
            level.attention |= has(format!("input_blocks.{place}.1."));
        }
    }
    let mut up = vec![Level::default()];
    let places = count(names, "output_blocks.");
    for place in 0..places {
        let upsampler = |behind| has(format!("output_blocks.{place}.{behind}.conv."));
        let Some(level) = up.last_mut() else { break };
        level.layers += 1;
        level.attention |= has(format!("output_blocks.{place}.1.")) && !upsampler(1);
        if (upsampler(1) || upsampler(2)) && place + 1 < places {
            up.push(Level::default());
        }
    }
    Levels { down, up }
}

#[cfg(test)]
mod tests {
    use super::super::rules::{to_diffusers, to_original};
    use super::*;

    /// The parameters of a UNet in diffusers' names, a weight for each module.
    fn names(down: &[bool], up: &[bool]) -> Vec<String> {
        let mut names: Vec<String> = ONCE.iter().map(|(name, _)| (*name).to_owned()).collect();
        let mut blocks = |side: &str, levels: &[bool], layers: usize, sampler: &str| {
            for (level, attention) in levels.iter().enumerate() {
                let block = format!("{side}_blocks.{level}");
                for layer in 0..layers {
                    for (module, _) in RESIDUAL {
                        names.push(format!("{block}.resnets.{layer}.{module}"));
                    }
                    if *attention {
                        let attention = format!("{block}.attentions.{layer}");
                        names.push(format!("{attention}.proj_in"));
                        names.push(format!("{attention}.transformer_blocks.0.attn1.to_q"));
                    }
                }
                if level + 1 < levels.len() {
                    names.push(format!("{block}.{sampler}.0.conv"));
                }
            }
        };
        blocks("down", down, 2, "downsamplers");
        blocks("up", up, 3, "upsamplers");
        for (module, _) in RESIDUAL {
            names.push(format!("mid_block.resnets.0.{module}"));
            names.push(format!("mid_block.resnets.1.{module}"));
        }
        names.push("mid_block.attentions.0.proj_in".into());
        names.iter().map(|name| format!("{name}.weight")).collect()
    }

    #[test]
    fn the_two_namings_lead_to_each_other() {
        for (down, up) in [
            (&[true, true, true, false][..], &[false, true, true, true][..]),
            (&[false, true, true], &[true, true, false]),
            (&[true], &[true]),
        ] {
            let ours = names(down, up);
            let from = rules(&ours.iter().map(String::as_str).collect());
            let theirs: Vec<String> =
                ours.iter().map(|name| to_original(&from, name).expect("known").0).collect();
            let distinct: BTreeSet<&str> = theirs.iter().map(String::as_str).collect();
            assert_eq!(distinct.len(), ours.len());
            let back = rules(&distinct);
            for (ours, theirs) in ours.iter().zip(&theirs) {
                let (names, lie) = to_diffusers(&back, theirs).expect("known");
                assert_eq!((names, lie), (vec![ours.clone()], Lie::Same), "{theirs}");
            }
        }
    }

    #[test]
    fn known_places_of_stable_diffusion() {
        let names = names(&[true, true, true, false], &[false, true, true, true]);
        let rules = rules(&names.iter().map(String::as_str).collect());
        for (ours, theirs) in [
            ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks.4.0.skip_connection"),
            ("down_blocks.2.attentions.1.proj_in", "input_blocks.8.1.proj_in"),
            ("down_blocks.2.downsamplers.0.conv", "input_blocks.9.0.op"),
            ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
            ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
            ("up_blocks.3.attentions.2.proj_in", "output_blocks.11.1.proj_in"),
        ] {
            assert_eq!(to_original(&rules, ours).expect("known").0, theirs);
        }
    }
}
