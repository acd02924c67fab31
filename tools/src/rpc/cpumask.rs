//! Sets of cores in the words operators use: `0x5` (mask), `[0,2-3]` or `0,2-3` (list).

/// Cores the kernel's tools know at most; a larger number is a typo.
const CORES_MAX: u32 = 1024;

/// Parses a mask (`0x5`, or hexadecimal digits alone) or a list (`[0,2-3]`, `0,2-3`); the cores come sorted.
///
/// A number alone is a mask, as everywhere in this field: `3` is cores 0 and 1, core 3 is `[3]` or `0x8`.
pub fn parse(text: &str) -> Result<Vec<u32>, String> {
    let trimmed = text.trim();
    let bracketed = trimmed.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let mut cores = match bracketed {
        Some(list) => parse_list(list),
        None if trimmed.contains([',', '-']) => parse_list(trimmed),
        None => parse_mask(trimmed),
    }
    .ok_or_else(|| {
        format!("\"{text}\" is not a set of cores; write a mask as 0x5, or a list as [0,2-3] (cores 0 to {})", CORES_MAX - 1)
    })?;
    cores.sort_unstable();
    cores.dedup();
    if cores.is_empty() {
        return Err(format!("\"{text}\" names no core; name at least one, as in 0x1"));
    }
    Ok(cores)
}

/// The mask of a set of cores, as `0x5`.
pub fn format(cores: &[u32]) -> String {
    let highest = cores.iter().copied().max().unwrap_or(0).min(CORES_MAX - 1);
    let mut digits = vec![0_u32; usize::try_from(highest / 4 + 1).unwrap_or(1)];
    for core in cores.iter().filter(|core| **core < CORES_MAX) {
        if let Some(digit) = digits.get_mut(usize::try_from(core / 4).unwrap_or(usize::MAX)) {
            *digit |= 1 << (core % 4);
        }
    }
    let text: String =
        digits.iter().rev().filter_map(|digit| char::from_digit(*digit, 16)).collect();
    format!("0x{text}")
}

fn parse_mask(text: &str) -> Option<Vec<u32>> {
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")).unwrap_or(text);
    if digits.is_empty() || !digits.chars().all(|c| c.is_ascii_hexdigit()) {
        return None;
    }
    let mut cores = Vec::new();
    let mut first = 0_u32;
    for digit in digits.chars().rev() {
        let bits = digit.to_digit(16)?;
        for bit in (0..4).filter(|bit| bits & (1 << bit) != 0) {
            let core = first + bit;
            if core >= CORES_MAX {
                return None;
            }
            cores.push(core);
        }
        first = first.checked_add(4)?;
    }
    Some(cores)
}

fn parse_list(text: &str) -> Option<Vec<u32>> {
    let core = |text: &str| text.trim().parse::<u32>().ok().filter(|core| *core < CORES_MAX);
    let mut cores = Vec::new();
    for item in text.split(',') {
        match item.split_once('-') {
            None => cores.push(core(item)?),
            Some((first, last)) => {
                let (first, last) = (core(first)?, core(last)?);
                if first > last {
                    return None;
                }
                cores.extend(first..=last);
            }
        }
        if cores.len() > 2 * usize::try_from(CORES_MAX).ok()? {
            return None;
        }
    }
    Some(cores)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_and_lists_mean_cores() {
        assert_eq!(parse("0x5"), Ok(vec![0, 2]));
        assert_eq!(parse("3"), Ok(vec![0, 1]));
        assert_eq!(parse("[3]"), Ok(vec![3]));
        assert_eq!(parse("[0, 2-4,2]"), Ok(vec![0, 2, 3, 4]));
        assert_eq!(parse("1-2"), Ok(vec![1, 2]));
        assert_eq!(parse("0x100000000000000000"), Ok(vec![68]));
        assert_eq!(format(&[0, 2]), "0x5");
        assert_eq!(format(&[68]), "0x100000000000000000");
        assert_eq!(format(&[]), "0x0");
        for bad in [
            "",
            "0x",
            "0xg",
            "[",
            "[]",
            "[1",
            "0",
            "[5-2]",
            "[1024]",
            "-1",
            "1,,2",
            &"f".repeat(300),
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
