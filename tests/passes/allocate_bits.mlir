// RUN: not moec opt %s -p 'allocate-bits{average=1.5}' 2>&1 | filecheck %s --check-prefix=LOW
// RUN: not moec opt %s -p 'allocate-bits{bits=2,2}' 2>&1 | filecheck %s --check-prefix=TWICE
// RUN: not moec opt %s -p 'allocate-bits{bits=2,9}' 2>&1 | filecheck %s --check-prefix=NINE
// RUN: not moec opt %s -p 'allocate-bits{at-least=5:1}' 2>&1 | filecheck %s --check-prefix=PAIR
// RUN: not moec opt %s -p 'allocate-bits{unit=micro bits=8,4 shares=0.5,0.6}' 2>&1 | filecheck %s --check-prefix=SHARES
// RUN: not moec opt %s -p 'allocate-bits{objective=single-drop}' 2>&1 | filecheck %s --check-prefix=TWO
// RUN: not moec opt %s -p 'allocate-bits{max-loss=0.1 unit=projection}' 2>&1 | filecheck %s --check-prefix=WHOLE
// RUN: not moec opt %s -p 'allocate-bits{method=gptq objective=energy}' 2>&1 | filecheck %s --check-prefix=CODES
// RUN: not moec opt %s -p 'allocate-bits{method=gptq max-loss=0.1}' 2>&1 | filecheck %s --check-prefix=CODES
// RUN: not moec opt %s -p allocate-bits 2>&1 | filecheck %s --check-prefix=ALONE
// RUN: not moec opt %s -p 'quantize{planned kind=ternary}' 2>&1 | filecheck %s --check-prefix=KIND

// LOW: an average of 1.5 bits is below the smallest choice, 2
// TWICE: bits must be different numbers
// NINE: integers have 1 to 8 bits, not 9
// PAIR: at-least '5:1' is no pair such as 2:1, of one of the choices
// SHARES: shares must be one per choice of bits, not negative, and add to 1
// TWO: single-drop chooses between two numbers of bits, such as bits=2,4
// WHOLE: losses are measured of whole experts: take unit=expert
// CODES: method=gptq is for an average of experts or matrices, with objective=output or pmq
// ALONE: there is no model to plan for
// KIND: weights of kind ternary have no bits to choose, as planned needs
"builtin.module"() ({
  "func.func"() <{function_type = () -> tensor<1xf32>, sym_name = "main"}> ({
    %w = "moec.weight"() <{source = "w", weight_name = "w"}> : () -> tensor<1xf32>
    "func.return"(%w) : (tensor<1xf32>) -> ()
  }) : () -> ()
}) : () -> ()
