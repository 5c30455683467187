/* SPDX-License-Identifier: Apache-2.0 */
/* COM1 as a console. Source: PC16550D data sheet. */
#include <stdarg.h>
#include "guest.h"

enum { COM1 = 0x3f8, DATA = 0, IER = 1, FCR = 2, LCR = 3, MCR = 4, LSR = 5 };
enum { LSR_DATA = 0x01, LSR_THRE = 0x20 };

static u8 input[256];
static volatile u8 input_head, input_tail;

void serial_init(void)
{
    outb(COM1 + IER, 0);
    outb(COM1 + LCR, 0x80);
    outb(COM1 + DATA, 1); /* 115200 baud */
    outb(COM1 + IER, 0);
    outb(COM1 + LCR, 0x03);
    outb(COM1 + FCR, 0x01);
    outb(COM1 + MCR, 0x0b); /* DTR RTS OUT2 */
}

static void put(const char *s, size_t count)
{
    /* An empty transmitter takes a whole FIFO. */
    while (count) {
        size_t part = count < 16 ? count : 16;
        while (!(inb(COM1 + LSR) & LSR_THRE))
            cpu_pause();
        for (size_t i = 0; i < part; i++)
            outb(COM1 + DATA, (u8)s[i]);
        s += part;
        count -= part;
    }
}

void serial_write(const char *s, size_t count)
{
    while (count) {
        size_t line = 0;
        while (line < count && s[line] != '\n')
            line++;
        put(s, line);
        if (line < count) {
            put("\r\n", 2);
            line++;
        }
        s += line;
        count -= line;
    }
}

/* Moves what arrived into the buffer: from the interrupt, or by polling with interrupts off. */
void serial_irq(void)
{
    while (inb(COM1 + LSR) & LSR_DATA) {
        u8 c = inb(COM1 + DATA);
        if ((u8)(input_head + 1) != input_tail)
            input[input_head++] = c;
    }
}

int serial_read(void)
{
    if (input_head == input_tail)
        return -1;
    return input[input_tail++];
}

/* --- formatted output, gathered so that a line is few port accesses --- */

static char line[256];
static size_t line_length;

static void emit(char c)
{
    line[line_length++] = c;
    if (line_length == sizeof(line)) {
        serial_write(line, line_length);
        line_length = 0;
    }
}

static void emit_padded(const char *s, size_t length, size_t width, char pad, int left)
{
    if (!left)
        for (size_t i = length; i < width; i++)
            emit(pad);
    for (size_t i = 0; i < length; i++)
        emit(s[i]);
    if (left)
        for (size_t i = length; i < width; i++)
            emit(' ');
}

void print(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    for (; *format; format++) {
        if (*format != '%') {
            emit(*format);
            continue;
        }
        char pad = ' ', digits[24];
        int left = 0, longer = 0, negative = 0;
        size_t width = 0;
        for (format++; *format == '-' || *format == '0'; format++) {
            if (*format == '-')
                left = 1;
            else
                pad = '0';
        }
        for (; *format >= '0' && *format <= '9'; format++)
            width = width * 10 + (size_t)(*format - '0');
        for (; *format == 'l'; format++)
            longer = 1;
        switch (*format) {
        case 'c':
            digits[0] = (char)va_arg(arguments, int);
            emit_padded(digits, 1, width, ' ', left);
            break;
        case 's': {
            const char *s = va_arg(arguments, const char *);
            emit_padded(s, strlen(s), width, ' ', left);
            break;
        }
        case 'd':
        case 'u':
        case 'x': {
            u64 value = longer ? va_arg(arguments, u64) : va_arg(arguments, u32);
            u64 base = *format == 'x' ? 16 : 10;
            size_t at = sizeof(digits);
            if (*format == 'd') {
                long number = longer ? (long)value : (long)(int)(u32)value;
                negative = number < 0;
                value = negative ? -(u64)number : (u64)number;
            }
            do
                digits[--at] = "0123456789abcdef"[value % base];
            while (value /= base);
            if (negative)
                digits[--at] = '-';
            emit_padded(digits + at, sizeof(digits) - at, width, pad, left);
            break;
        }
        case 0:
            format--;
            break;
        default:
            emit(*format);
        }
    }
    va_end(arguments);
    serial_write(line, line_length);
    line_length = 0;
}
